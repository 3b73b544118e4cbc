"""Letters at the end of array names, such as logits_BTV: one table says what each means."""

import ast
import re
from pathlib import Path

import ssp_jax

ROOT = Path(ssp_jax.__file__).parent
TABLE = dict(re.findall(r"^  ([A-Z])  (.+)$", ssp_jax.__doc__ or "", re.MULTILINE))


def test_each_letter_of_an_array_name_is_in_the_table():
    unknown = {}
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for field in ("id", "arg", "attr"):
                name = str(getattr(node, field, ""))
                suffix = re.fullmatch(r"[a-z_][a-z0-9_]*_([A-Z][A-Z0-9]*)", name)
                letters = re.findall("[A-Z]", suffix[1]) if suffix else []
                if not set(letters) <= set(TABLE):
                    unknown[name] = file.name
    assert len(TABLE) > 20 and unknown == {}
