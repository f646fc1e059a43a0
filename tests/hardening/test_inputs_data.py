"Files of examples and grids that are wrong: each is refused by its name and place, or taken; nothing else happens."
import json
import random

import pandas as pd
import pytest
from bad_inputs import (
    NESTED,
    ODD,
    as_text,
    refusal,
    refused,
    spoiled_bytes,
    spoiled_value,
    spoilings,
    written,
)
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab.data import data_hash, encode, load_examples, split
from qlora_lab.engine.data_report import data_report
from qlora_lab.grids import cells, names, read_grid
from qlora_lab.records import LabError, read_json

pytestmark = pytest.mark.usefixtures("one_thread")
