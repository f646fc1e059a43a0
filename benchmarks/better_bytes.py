"""Better weights in the bytes of NF4 with double quantization, and what rounding each layer costs: parts of
benchmarks.data_types.
"""
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_lab.blockwise import codebook, to_blocks
from qlora_lab.divergence import Said
from qlora_lab.double_quant import STATS_BLOCK, QuantizedTensor, quantize_4bit
from qlora_lab.engine import calibrated
from qlora_lab.engine.calibrated import gathered, with_codes
from qlora_lab.engine.chosen_scales import (
    MULTIPLES,
    Chosen,
    chosen_together,
    damped,
    fed_back,
    scale_of_each,
    with_chosen_scales,
)
from qlora_lab.engine.sensitivity import estimated, rounding_error, within_bytes
from qlora_lab.measures import beside

if TYPE_CHECKING:
    from benchmarks.data_types import Study

NF4_DQ = ("nf4", 64, True)
ALONE = "smollm2"  # the model on which everything is tried


def put(study: "Study", quantize) -> dict:
    "Each layer's weight by a function of (layer, weight) to QuantizedTensor; bits and error as of a format."
    stored = off = whole = 0.
    for name, m in study.layers.items():
        q = quantize(m, study.before[name])
        new = q.dequantize(torch.float32)
        stored, off = stored + 8 * q.nbytes, off + (new - study.before[name]).double().square().sum().item()
        whole += study.before[name].double().square().sum().item()
        with torch.no_grad(): m.weight.copy_(new)
    return {"bits": stored / sum(w.numel() for w in study.before.values()), "error": (off / whole) ** 0.5}


def of_either_sign(q: QuantizedTensor) -> QuantizedTensor:
    "With a second level that can say negative scales too: no offset, and the largest scale of each 256 as its unit."
    absmax2 = to_blocks(q.absmax, STATS_BLOCK).amax(1)
    return replace(q, absmax2=absmax2, offset=torch.zeros_like(q.offset))


BOTH = (*MULTIPLES, *(-m for m in MULTIPLES))


def by_scales(sums: dict | None = None, either: bool = False):
    "Scales alone, weighted by the inputs where their sums are given."
    def quantize(layer, w):
        q = quantize_4bit(w, *NF4_DQ)
        importance = None if sums is None else damped(sums[layer]).diagonal()
        return with_chosen_scales(of_either_sign(q) if either else q, w, importance, BOTH if either else MULTIPLES)
    return quantize


def by_feedback(sums: dict, scales: bool):
    "GPTQ's codes under the absmax, or under chosen scales, and no more."
    def quantize(layer, w):
        q, h = quantize_4bit(w, *NF4_DQ), damped(sums[layer])
        if scales: q = with_chosen_scales(q, w, h.diagonal())
        return with_codes(q, fed_back(w, scale_of_each(q, w), codebook("nf4").to(w.device), h))
    return quantize


def by_all(sums: dict, kind: tuple = NF4_DQ):
    "Everything: scales, feedback, search, scales again."
    done, layers = {}, list(sums)
    def quantize(layer, w):
        if layer not in done:
            together = [m for m in layers if sums[m] is sums[layer]]
            done.update(zip(together, chosen_together([m.weight for m in together], kind, sums[layer])))
        return done.pop(layer)
    return quantize


def one_after_the_other(study: "Study", rows: list):
    "The same, each decoder layer seeing what the quantized ones before it put out."
    layers = list(study.layers.values())
    size = 4 * sum(m.in_features ** 2 for m in layers) // study.model.config.num_hidden_layers
    before, calibrated.ROOM = calibrated.ROOM, size
    chosen = Chosen(study.model, layers, rows)
    calibrated.ROOM = before
    return lambda layer, w: chosen(layer, *NF4_DQ)


def with_mean_corrected(study: "Study", rows: list) -> dict:
    "Absmax, and a bias for each layer that takes the mean error of its output away: a bias, so not the same format."
    means, hooks = {}, []
    def hook(layer, args): means.setdefault(layer, []).append(args[0].reshape(-1, args[0].shape[-1]).mean(0))
    for m in study.layers.values(): hooks.append(m.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in rows: study.model(input_ids=ids.to(study.device), use_cache=False)
    for h in hooks: h.remove()
    told = put(study, lambda layer, w: quantize_4bit(w, *NF4_DQ))
    for name, m in study.layers.items():
        off = (study.before[name] - m.weight.detach()) @ torch.stack(means[m]).mean(0)
        m.bias = torch.nn.Parameter(off, requires_grad=False)
    return told


def random_rows(study: "Study", rows: list) -> list:
    "As many tokens without any sense: the control of a calibration."
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, len(study.tokenizer), ids.shape, generator=draw) for ids in rows]


def ways(study: "Study", rows: list) -> None:
    "What was tried on every model, and more on one."
    layers, model = list(study.layers.values()), study.model
    def note(name, make): study.note("better", name, make)
    with torch.no_grad(): sums = gathered(model, layers, rows)
    def way(name, quantize): note(name, lambda: put(study, quantize))
    way("absmax", lambda layer, w: quantize_4bit(w, *NF4_DQ))
    way("scales", by_scales())
    way("scales, weighted", by_scales(sums))
    way("all of it", by_all(sums))
    way("scales of either sign", by_scales(either=True))
    way("scales of either sign, weighted", by_scales(sums, either=True))
    if study.name != ALONE: return
    way("absmax, error fed back", by_feedback(sums, scales=False))
    way("scales, weighted, error fed back", by_feedback(sums, scales=True))
    note("absmax, mean corrected", lambda: with_mean_corrected(study, rows))
    note("all of it, one after the other", lambda: put(study, one_after_the_other(study, rows)))
    other = {"8 documents": rows[:1], "tokens without sense": random_rows(study, rows)}
    for name, some in other.items():
        with torch.no_grad(): fewer = gathered(model, layers, some)
        way(f"all of it, {name}", by_all(fewer))
    way("all of it, blocks of 128", by_all(sums, ("nf4", 128, True)))
    note("bitsandbytes decodes", lambda: by_bitsandbytes(study, by_all(sums)))


def by_bitsandbytes(study: "Study", quantize) -> dict:
    "The same bytes as `all of it`, decoded by bitsandbytes; `same` tells whether every number is the lab's."
    import bitsandbytes.functional as bnb
    same = True
    for name, m in study.layers.items():
        q = quantize(m, study.before[name])
        theirs = bnb.dequantize_4bit(*q.to_bitsandbytes()).float()
        same &= torch.equal(theirs, q.dequantize(torch.float32))
        with torch.no_grad(): m.weight.copy_(theirs)
    return {"same": same}


def layer_by_layer(study: "Study", rows: list) -> None:
    "What rounding one layer costs, measured and estimated; a budget of bytes spent by it, and spent otherwise."
    single, few = study.found.setdefault("layers", {}), slice(0, len(study.rows), 2)
    held, reference = study.rows[few], Said(*(part[few] for part in study.reference))
    def error(name): return rounding_error(study.layers[name], *NF4_DQ)
    for name, m in study.layers.items():
        if name in single: continue
        delta = error(name)
        with torch.no_grad(): m.weight.add_(delta)
        found = beside(study.model, held, reference)
        with torch.no_grad(): m.weight.copy_(study.before[name])
        relative = (delta.norm() / study.before[name].norm()).item()
        single[name] = {"kl": found["KL"].sums, "nats": found["loss"].sums, "error": relative, "weights": delta.numel()}
    study.write()
    tokens = sum(len(row.ids) - 1 for row in held)
    if "estimated" not in study.found:
        apart = [r[None] for ids in rows for r in ids]
        found = estimated(study.model, apart, study.layers, NF4_DQ)
        study.found["estimated"] = {n: sum(v) / len(v) for n, v in found.items()}
        study.write()
    by_kl = {n: sum(d["kl"]) / tokens for n, d in single.items()}
    by_error = {n: d["error"] ** 2 * d["weights"] for n, d in single.items()}
    chance = random.Random(0)
    orders = {"measured": by_kl, "estimated": study.found["estimated"], "largest error": by_error,
              "first layers": {n: (len(single) - i) * single[n]["weights"] for i, n in enumerate(single)},
              **{f"by chance {i}": {n: chance.random() * single[n]["weights"] for n in single} for i in range(3)}}
    whole = 2 * sum(w.numel() for w in study.before.values())
    for share in (0.01, 0.02, 0.05, 0.1, 0.2):
        for order, nats in orders.items():
            kept = within_bytes(study.model, study.layers, nats, int(share * whole))
            study.note("kept", f"{share:.0%}, {order}", lambda kept=kept: without(study, kept))


def without(study: "Study", kept: list[str]) -> dict:
    "Every layer but these rounded; bits a weight with those in 16."
    stored = 0.
    for name, m in study.layers.items():
        if name in kept:
            stored += 16 * m.weight.numel()
            continue
        q = quantize_4bit(study.before[name], *NF4_DQ)
        stored += 8 * q.nbytes
        with torch.no_grad(): m.weight.copy_(q.dequantize(torch.float32))
    return {"bits": stored / sum(w.numel() for w in study.before.values()), "kept": kept}
