"The lab beside its peers, both sides in one run; `python -m benchmarks.NAME`."
import qlora_lab  # noqa: F401  before torch, so that how threads wait is chosen
