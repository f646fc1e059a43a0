"""Chat templates in the manner of well-known models, in words of their own, and a tokenizer that writes them.

`TEMPLATES` gives a template by name and how a conversation comes out of it: "one" row with all answers, or a row an
answer where earlier turns are rewritten. `LEADS` is what a template writes before an answer that follows its
generation prompt."""
from conftest import CHATML

MARKED = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
          "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
          "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = ("{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
           "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}")
STRICT = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
          "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('user and model take turns') }}{% endif %}"
          "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
          "{% if add_generation_prompt %}<turn>model\n{% endif %}")
BRACKETS = ("{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
            "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
            "{% for m in turns %}{% if m.role == 'user' %}{% set last = loop.index0 >= turns | length - 2 %}"
            "[INST] {{ system + '\n\n' if system and last }}{{ m.content }}[/INST]"
            "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
            "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}")
THINKING = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- if tools -%}{{ '<|im_start|>system\n# Tools\n' }}{%- for t in tools -%}{{ (t | tojson) + '\n' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}"
    "{%- if m.role == 'tool' -%}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- elif m.role == 'assistant' -%}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- set thought = '' -%}{%- if '</think>' in m.content -%}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last -%}{{ '<think>\n' + thought + '\n</think>\n\n' + said }}"
    "{%- else -%}{{ said }}{%- endif -%}{%- for c in m.tool_calls or [] -%}"
    "{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor -%}"
    "{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}")
CLOSED = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")

MARKS = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>", "</turn>", "<|end|>",
         "<|user|>", "<|assistant|>", "<|system|>", "<s>", "</s>"]
# template, rows ("one" or "each"), what it writes before the words of an answer, and behind them
TEMPLATES = {"chatml": (CHATML, "one", "", "<|im_end|>"), "marked": (MARKED, "one", "", "<|im_end|>"),
             "headers": (HEADERS, "one", "", "<|eot|>"), "strict": (STRICT, "one", "", "</turn>"),
             "brackets": (BRACKETS, "one", " ", "</s>"),
             "thinking": (THINKING, "each", "<think>\n\n</think>\n\n", "<|im_end|>"),
             "closed": (CLOSED, "each", "", "<|end|>\n</s>")}


def tokenizer_of(template=None, begins=False, merges=True, **options):
    "Bytes with some merges that reach over white space, and the marks of all templates as special tokens."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("a", "b"), ("ĠĠ", "ĠĠ"), (".", "Ċ")] if merges else []
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate([*letters, *map("".join, pairs)])}, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if begins:
        start = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", start)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False} | options
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    if template: made.chat_template = template
    return made
