"""Tables in place of searches: lesson 01's nearest level and way back beside their twins in engine/tables.

    python -m benchmarks.tables

Prints medians and ratios (above 1: the table is faster), writes results/tables_cpu.json. The sides take turns.
"""
import pandas as pd
import torch

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.blockwise import codebook, dequantize_blockwise, midpoints, pack_4bit, quantize_blockwise, unpack_4bit
from qlora_lab.double_quant import levels_by_code
from qlora_lab.engine.tables import dequantize_by_table, nearest_by_table


def sides(n: int = 1 << 24) -> dict[str, dict]:
    "Pairs of callables with equal results, over 16.8 M numbers."
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    scaled, code = x / x.abs().max(), codebook("nf4")
    codes, absmax = quantize_blockwise(x, "nf4", 64)
    packed, levels = pack_4bit(codes), levels_by_code("nf4")

    def search(): return torch.bucketize(scaled, midpoints(code), out_int32=True).to(torch.uint8)
    def table(): return nearest_by_table(scaled, code)
    assert torch.equal(search(), table())
    rows = {"nearest of 16 levels": {"plain": search, "table": table}}
    for dtype in (torch.float32, torch.bfloat16):
        def plain(dtype=dtype): return dequantize_blockwise(unpack_4bit(packed, n), absmax, code, 64).to(dtype)
        def pairs(dtype=dtype): return dequantize_by_table(packed, absmax, levels, 64, n, dtype)
        assert torch.equal(plain(), pairs())
        rows[f"way back to {str(dtype)[6:]}"] = {"plain": plain, "table": pairs}
    return rows


def main() -> None:
    rows = {}
    for name, pair in sides().items():
        rows[name] = {side: spread_of(seconds) for side, seconds in interleaved(pair).items()}
    save_result("tables_cpu", {"numbers": 1 << 24, "rows": rows})
    table = pd.DataFrame({name: {side: r["median_ms"] for side, r in row.items()} for name, row in rows.items()}).T
    print(table.assign(ratio=table["plain"] / table["table"]).round(1).to_string())


if __name__ == "__main__": main()
