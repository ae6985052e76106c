"""An object that is read entry by entry is what the json module reads at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moeq.format.files import unique
from vllm_moeq.format.walk import Walk

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def walked(text: str) -> dict[str, Any]:
    walk, found = Walk(text), dict[str, Any]()
    for key in walk.keys(found):
        found[key] = walk.value()
    walk.end()
    return found


@given(st.dictionaries(st.text(), VALUES, max_size=6), st.sampled_from((None, 1, "\t")), st.booleans())
def test_as_the_json_module(value: dict[str, Any], indent: int | str | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    found = walked(f" {text}\n")
    assert found == value
    assert list(found) == list(value)


@given(st.data())
def test_damaged_text_is_refused_as_by_the_json_module(data: st.DataObject) -> None:
    text = list(json.dumps(data.draw(st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=3))))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.sampled_from(("", ",", ":", '"', "{", "}", "[", "]", "\\", "\x00", "1", " ")))
    damaged = "".join(text)
    if not damaged.lstrip().startswith("{"):
        return
    try:
        expected = json.loads(damaged, object_pairs_hook=unique)
    except ValueError:
        with pytest.raises(ValueError, match=r"xpect|Inva|stands twice|control|Untermin|Extra"):
            walked(damaged)
    else:
        assert walked(damaged) == expected


@pytest.mark.parametrize(
    "text", ['{"a": 1,}', '{,"a": 1}', '{"a": 1 "b": 2}', "{'a': 1}", '{"a" 1}', '{"a": 1', "{} {}"]
)
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(ValueError, match="xpect"):
        walked(text)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": 1, "\\u0061": 2}', '{"a": {"b": 1, "b": 2}}'])
def test_a_key_stands_once(text: str) -> None:
    with pytest.raises(ValueError, match="stands twice"):
        walked(text)
