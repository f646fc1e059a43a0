"""What is learned of a conversation, under any template and by any tokenizer: the answers, what ends them, and nothing
else; or a sentence that says why it is not certain."""
import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from templates import MARKED, TEMPLATES, THINKING, tokenizer_of

from conftest import searched
from qlora_lab.data import Example, encode, load_examples, pair, tokenize
from qlora_lab.records import LabError

TOKENIZERS = {name: tokenizer_of(template) for name, (template, *_) in TEMPLATES.items()}


def turn(role, content, **more): return {"role": role, "content": content, **more}


def learned(tokenizer, rows): return [tokenizer.decode(row.ids[row.mask]) for row in rows]


WORDS = st.text(st.sampled_from("ab .\n é👍🏽{}<|>'\"日"), min_size=1, max_size=12).filter(lambda t: t.strip())


@st.composite
def conversations(draw):
    turns = [turn(role, draw(WORDS)) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    return ([turn("system", draw(WORDS))] if draw(st.booleans()) else []) + turns


@pytest.mark.parametrize("name", TEMPLATES)
@searched(40)
@given(turns=conversations())
def test_the_answers_and_what_ends_them_are_learned(name, turns):
    """For any conversation the learned tokens decode to the answers with their end marks; a token that reaches over the
    seam brings white space along, and nothing else."""
    template, rows, lead, end = TEMPLATES[name]
    tokenizer, example = TOKENIZERS[name], Example(tuple(turns), source="mine.jsonl:7")
    if name == "strict" and turns[0]["role"] == "system":
        with pytest.raises(LabError, match="mine.jsonl:7: .*no system turns"): encode(tokenizer, [example], 4096)
        return
    assume(name != "thinking" or "think" not in str(turns))
    made = encode(tokenizer, [example], 4096)
    trims = name in ("headers", "strict")
    answers = [m["content"].strip() if trims else m["content"] for m in turns if m["role"] == "assistant"]
    if name == "thinking": answers = [a.lstrip("\n") for a in answers]
    whole = [lead + a + end for a in answers]
    together = len(answers) == 1 or rows == "one" and not (name == "brackets" and turns[0]["role"] == "system")
    if together: whole = ["".join(whole)]
    assert len(made) == len(whole)
    for row, want, said in zip(made, whole, learned(tokenizer, made)):
        text = tokenizer.apply_chat_template(list(row.example.messages), tokenize=False)
        assert tokenizer.decode(row.ids) == text
        assert "".join(said.split()) == "".join(want.split()) and (said.endswith(want) or len(answers) > 1)
        assert row.example.source == "mine.jsonl:7"


def test_a_row_an_answer_stays_on_its_side():
    "Rows of one conversation share its group, so that an error bar does not take them for independent."
    e = Example((turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")), source="f:1")
    tokenizer = TOKENIZERS["thinking"]
    made = encode(tokenizer, [e])
    assert learned(tokenizer, made) == ["<think>\n\n</think>\n\nb<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    assert [(row.example.prompt, row.example.answer, row.example.stays_with) for row in made] == [
        ("a", "b", "c"), ("c", "d", "c")]
    with pytest.raises(LabError, match="f:1: .*rewrites earlier turns.*`encode`"): tokenize(tokenizer, e)


def test_a_row_knows_what_is_not_learned_in_it():
    "Turns of weight 0 that it still has, and none of those behind it."
    turns = [turn(("user", "assistant")[i % 2], "abcdef"[i]) for i in range(6)]
    made = encode(TOKENIZERS["thinking"], [Example(tuple(turns), unlearned=(1,))])
    assert [(len(row.example.messages), row.example.unlearned) for row in made] == [(4, (1,)), (6, (1,))]
    made = encode(TOKENIZERS["thinking"], [Example(tuple(turns), unlearned=(3,))])
    assert [(len(row.example.messages), row.example.unlearned) for row in made] == [(2, ()), (6, (3,))]


def test_thinking_that_is_written_is_learned_where_it_is_kept():
    "Dropped from earlier turns, as the template does when it asks; learned in the row of its own answer."
    e = Example((turn("user", "a"), turn("assistant", "<think>\nhm\n</think>\n\nb"), turn("user", "c"),
                 turn("assistant", "d")))
    first, second = encode(TOKENIZERS["thinking"], [e])
    assert learned(TOKENIZERS["thinking"], [first]) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert "hm" not in TOKENIZERS["thinking"].decode(second.ids)


@searched(40)
@given(turns=conversations())
def test_a_templates_own_marks_are_those_of_transformers(turns):
    tokenizer = TOKENIZERS["marked"]
    row, = encode(tokenizer, [Example(tuple(turns))], 4096)
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert row.ids.tolist() == theirs["input_ids"] and row.mask.int().tolist() == theirs["assistant_masks"]


TOOLS = ({"type": "function", "function": {"name": "warmth", "description": "How warm it is.", "parameters": {}}},)
FUNCTION = {"name": "warmth", "arguments": {"at": "Lima"}}
CALL = turn("assistant", "", tool_calls=[{"type": "function", "function": FUNCTION}])


def test_tool_calls_are_learned_and_what_tools_say_is_not():
    tokenizer = TOKENIZERS["thinking"]
    e = Example((turn("user", "Warm?"), CALL, turn("tool", "21 degrees"), turn("assistant", "Yes.")), tools=TOOLS)
    row, = encode(tokenizer, [e])
    call = '\n<tool_call>\n{"name": "warmth", "arguments": {"at": "Lima"}}\n</tool_call><|im_end|>'
    think = "<think>\n\n</think>\n\n"
    assert learned(tokenizer, [row]) == [think + call + think + "Yes.<|im_end|>"]
    assert "How warm it is." in tokenizer.decode(row.ids) and "21 degrees" in tokenizer.decode(row.ids)


def test_what_a_template_leaves_out_is_refused():
    "Tools, calls, and whole turns; each named with the place of the example."
    talk = turn("user", "Warm?"), turn("assistant", "Yes.")
    cases = [(TOKENIZERS["chatml"], Example(talk, source="f:3", tools=TOOLS), "does not show tools"),
             (TOKENIZERS["chatml"], Example((talk[0], CALL), source="f:3"), "does not write tool calls"),
             (TOKENIZERS["strict"], Example((talk[1], *talk), source="f:3"), "take turns|begin with an answer"),
             (tokenizer_of("{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>"
                           "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"),
              Example((turn("system", "Be brief."), *talk), source="f:3"), "leaves out turn 1, .*'system'")]
    for tokenizer, example, message in cases:
        with pytest.raises(LabError, match=f"f:3: .*({message})"): encode(tokenizer, [example])


UNCERTAIN = {
    "no end mark": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}", "no end mark"),
    "a prompt that thinks": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
                             "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}", "ends in '<think>'"),
    "no generation prompt": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
                             "no generation prompt"),
    "marks before the end": (MARKED.replace("<|im_end|>{% endgen", "{% endgen")
                             .replace("{% else", "<|im_end|>{% else"), "end before the end mark"),
    "marks around nothing": (MARKED.replace("{{ m.content }}<|im_end|>{% endgen", "{% endgen")
                             .replace("{% else", "{{ m.content }}<|im_end|>{% else"), "leave out an answer"),
    "half an answer": (TEMPLATES["chatml"][0].replace("m['content']", "m['content'][:2]"), "leaves out|part of")}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_refused(name):
    template, message = UNCERTAIN[name]
    example = Example((turn("user", "hi"), turn("assistant", "good day")), source="f:9")
    with pytest.raises(LabError, match=f"f:9: .*{message}"): encode(tokenizer_of(template), [example])


def test_only_the_completion_of_a_conversational_prompt_is_learned():
    "TRL's form, and a weight of 0: such answers are read and not learned, with marks of the template's own too."
    rows = [{"prompt": [turn("user", "a"), turn("assistant", "no"), turn("user", "b")],
             "completion": [turn("assistant", "yes")]},
            {"messages": [turn("user", "a"), turn("assistant", "no", weight=0), turn("user", "b"),
                          turn("assistant", "yes", weight=1)]}]
    for name in ("chatml", "marked"):
        made = encode(TOKENIZERS[name], load_examples(rows))
        assert learned(TOKENIZERS[name], made) == ["yes<|im_end|>"] * 2
        assert all("no" in TOKENIZERS[name].decode(row.ids) for row in made)
    apart = learned(TOKENIZERS["thinking"], encode(TOKENIZERS["thinking"], load_examples(rows)))
    assert len(apart) == 2 and all(said.endswith("</think>\n\nyes<|im_end|>") for said in apart)


@searched(40)
@given(prompt=WORDS, answer=WORDS, begins=st.booleans())
def test_a_base_model_learns_completion_and_end(prompt, answer, begins):
    "Prompt and completion as they stand, between the tokenizer's own marks; the end mark once."
    tokenizer = BASE[begins]
    row = tokenize(tokenizer, pair(prompt, answer))
    assert tokenizer.decode(row.ids) == "<s>" * begins + prompt + answer + "</s>"
    said = tokenizer.decode(row.ids[row.mask])
    assert said.endswith(answer + "</s>") and not said.removesuffix(answer + "</s>").strip(" \n.a")


BASE = {begins: tokenizer_of(begins=begins) for begins in (False, True)}


def test_a_base_models_limits():
    "An end mark that is there is not written twice; other conversations, tools and tokenizers without one are refused."
    row = tokenize(BASE[True], pair("a", "b</s>"))
    assert BASE[True].decode(row.ids) == "<s>ab</s>"
    talk = turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")
    for turns in (talk, (turn("system", "s"), *talk[:2])):
        example = Example(turns, source="f:2")
        with pytest.raises(LabError, match="f:2: .*no chat template"): encode(BASE[True], [example])
    with pytest.raises(LabError, match="neither a chat template nor an end mark"):
        tokenize(tokenizer_of(eos_token=None), pair("a", "b"))


def test_a_tokenizer_that_ends_each_text_itself():
    "The end mark stands once."
    from tokenizers import processors
    tokenizer = tokenizer_of()
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, marks)
    row = tokenize(tokenizer, pair("x", "b"))
    assert tokenizer.decode(row.ids) == "<s>xb</s>" and tokenizer.decode(row.ids[row.mask]) == "b</s>"


@pytest.mark.parametrize("name", ["chatml", "base"])
def test_plain_text_is_learned_whole(name):
    "Every token, with the marks that begin and end a text; once, where they are written already."
    tokenizer = tokenizer_of(TEMPLATES["chatml"][0] if name == "chatml" else None, begins=True)
    for text in ("Once upon a time.", "<s>Once upon a time.</s>"):
        row, = encode(tokenizer, load_examples([{"text": text}]))
        assert row.mask.all() and tokenizer.decode(row.ids) == "<s>Once upon a time.</s>"


class Slow:
    "A tokenizer without offsets."
    is_fast = False

    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self.inner(text, **options)


@searched(40)
@given(turns=conversations())
def test_without_offsets_the_same_or_a_refusal(turns):
    "Never another mask than with offsets."
    tokenizer, example = TOKENIZERS["headers"], Example(tuple(turns), source="f:4")
    fast, = encode(tokenizer, [example], 4096)
    try: slow, = encode(Slow(tokenizer), [example], 4096)
    except LabError as e: assert "f:4: the tokenizer reports no offsets" in str(e)
    else: assert torch.equal(slow.ids, fast.ids) and torch.equal(slow.mask, fast.mask)


def test_without_offsets_and_without_merges_nothing_is_refused():
    tokenizer = tokenizer_of(TEMPLATES["chatml"][0], merges=False)
    row, = encode(Slow(tokenizer), [pair("hi", "  ça 👍🏽")])
    assert tokenizer.decode(row.ids[row.mask]) == "  ça 👍🏽<|im_end|>"


def test_offsets_that_leave_white_space_out():
    "As byte-level tokenizers may report them: the blanks that begin an answer are learned all the same."
    from tokenizers import processors
    tokenizer = tokenizer_of(TEMPLATES["chatml"][0])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row, = encode(tokenizer, [pair("f", "    x\n\n")])
    assert tokenizer.decode(row.ids[row.mask]).endswith("    x\n\n<|im_end|>")


def test_long_rows_are_refused_cut_or_dropped_and_always_counted():
    """Cut rows keep a certain mask without the end mark that was cut; what would lose its whole answer is dropped; and
    nothing is left out in silence."""
    tokenizer, said = tokenizer_of(TEMPLATES["chatml"][0], merges=False), []
    examples = [pair("a", "b" * 5), pair("a", "b" * 50), pair("a" * 60, "b", source="f:3")]
    with pytest.raises(LabError, match="longer than 40; .*long='truncate' or 'drop'"): encode(tokenizer, examples, 40)
    cut = encode(tokenizer, examples, 40, "truncate", say=said.append)
    assert [len(row.ids) for row in cut] == [len(tokenize(tokenizer, examples[0]).ids), 40]
    assert set(learned(tokenizer, cut)[1]) == {"b"} and learned(tokenizer, cut)[0] == "bbbbb<|im_end|>"
    assert len(encode(tokenizer, examples, 40, "drop", say=said.append)) == 1
    encode(tokenizer, examples, 400, "drop", "held-out examples", said.append)
    assert said == ["examples: 2 of 3 longer than 40 tokens, 1 truncated and 1 dropped",
                    "examples: 2 of 3 longer than 40 tokens, 0 truncated and 2 dropped",
                    "held-out examples: 0 of 3 longer than 400 tokens, 0 truncated and 0 dropped"]
    for long in ("truncate", "drop"):
        with pytest.raises(LabError, match="all 1 examples are longer than 40"):
            encode(tokenizer, examples[2:], 40, long, say=said.append)
    with pytest.raises(LabError, match="long='cut': expected"): encode(tokenizer, examples, 40, "cut")


def test_half_a_character_made_by_hand():
    "JSON is checked when it is read; an Example from Python when it is tokenized."
    with pytest.raises(LabError, match="f:1: .*half a character"):
        encode(TOKENIZERS["chatml"], [pair("a \ud83d", "b", source="f:1")])


def test_a_template_without_names_for_tools():
    "Tools that are no functions with a name cannot be looked for, so they are refused."
    e = Example((turn("user", "a"), turn("assistant", "b")), tools=(json.loads('{"type": "search"}'),), source="f:1")
    with pytest.raises(LabError, match="f:1: .*tools"): encode(tokenizer_of(THINKING), [e])


def test_long_is_an_option_of_a_run():
    "From the command line to the settings, where no other word than the three is taken."
    from qlora_lab import cli
    from qlora_lab.settings import TrainConfig
    assert cli.read("train", ["--long", "drop"]).training.long == "drop" and TrainConfig().long == "refuse"
    with pytest.raises(LabError, match="long"): TrainConfig(long="cut")
    with pytest.raises(LabError, match="truncate"): cli.read("train", ["--long", "cut"])
