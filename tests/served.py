"A GGUF file in llama.cpp, for the tests of `tests/serve`; the extra `serve` brings it."
import ctypes
from contextlib import contextmanager

import numpy as np


class Served:
    "A model in llama.cpp, on one thread, with keys and values kept in float32 as transformers keeps them."
    def __init__(self, file, **more):
        import llama_cpp
        self.library = llama_cpp
        self.model = llama_cpp.Llama(str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=1,
                                     flash_attn=False, type_k=0, type_v=0, **more)

    def logits(self, ids):
        "[tokens, words]: what is said after each token."
        self.model.reset()
        self.model.eval(list(ids))
        return np.array(self.model.scores[:len(ids)])

    def tokens(self, text): return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def answer(self, ids, length):
        "The greedy continuation, as tokens."
        self.model.reset()
        ids = list(ids)
        for _ in range(length):
            self.model.eval(ids[self.model.n_tokens:])
            ids.append(int(np.argmax(self.model.scores[self.model.n_tokens - 1])))
        return ids[-length:]

    def ends_at(self, token):
        "Whether an answer ends at a token."
        vocab = self.library.llama_model_get_vocab(self.model._model.model)
        return bool(self.library.llama_vocab_is_eog(vocab, ctypes.c_int32(token)))


@contextmanager
def served(file, **more):
    "Open a file in llama.cpp for the length of a block."
    opened = Served(file, **more)
    try: yield opened
    finally: opened.model.close()
