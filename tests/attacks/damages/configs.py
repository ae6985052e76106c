"""Damages of config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.attacks.damages.attack import ESCAPE, SHARD, Attack
from tests.attacks.forge import LAYER, config, config_text, file, ours, sparse, weight_map


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def key(name: str, value: object) -> Callable[[Path], None]:
    """Set a key of config.json."""
    return config(lambda it: it.update({name: value}))


def thousand_layers(folder: Path) -> None:
    text = ",".join(f'"x.{i}.a":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(1024))
    header = f"{{{text}}}".encode()
    (folder / "e0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1024))
    weight_map(lambda it: it.update({f"x.{i}.a": "e0.safetensors" for i in range(1024)}))(folder)
    key("num_hidden_layers", 1024)(folder)


SMALL = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 1}
SMALL |= {"decoder_attention_heads": 1, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "num_layers": 2}


def another_model(model_type: str, **changes: object) -> Callable[[Path], None]:
    """Say that it is a small model of another type, but for what is given."""
    names = {"bart": "BartForCausalLM", "nllb-moe": "NllbMoeForConditionalGeneration", "gpt_neo": "GPTNeoForCausalLM"}
    keys = {"model_type": model_type, "architectures": [names[model_type]], **SMALL, **changes}
    return config(lambda it: it.update(keys))


LEADING = [
    Attack(f"leading key: {name}", key(name, value), ("config.json", name, "expected no such key"), foreign=foreign)
    for name, value, foreign in (
        ("transformers_weights", "../outside.safetensors", False),
        ("configuration_files", ["config.4.0.json"], True),
        ("compression_config", {"quant_method": "compressed-tensors"}, True),
        ("speculators_config", {"verifier": {"name_or_path": "evil/model"}}, False),
        ("attn_implementation", "evil/kernel", True),
        ("_attn_implementation", "evil/kernel", True),
        ("experts_implementation", "evil/kernel", True),
        ("_experts_implementation", {"text_config": "evil/kernel"}, True),
        ("attribute_map", {"zz": "_attn_implementation_internal"}, True),
        ("base_model_tp_plan", {"layers.*": "colwise"}, True),
        ("fusion_config", {"x": 1}, True),
        ("vision_config", {"attn_implementation": "evil/kernel"}, True),
    )
]  # fmt: skip
"""Keys of config.json that lead a reader to code, other weights or another config."""

AGAINST_FILES = [
    Attack(f"{name} of {value!r:.20}", key(name, value), ("config.json", name, "expected"), foreign=True)
    for name, value in (
        ("num_hidden_layers", 3), ("num_hidden_layers", 10**8), ("num_hidden_layers", 0), ("num_hidden_layers", -1),
        ("num_hidden_layers", 2.5), ("num_hidden_layers", "2"), ("num_hidden_layers", float("nan")),
        ("hidden_size", -64), ("hidden_size", 0), ("hidden_size", 10**30), ("hidden_size", "64"),
        ("num_labels", 2**53), ("num_labels", 10**6), ("num_labels", -1),
        ("vocab_size", 10**12), ("vocab_size", 1.5), ("num_attention_heads", 0), ("num_attention_heads", float("nan")),
    )
]  # fmt: skip
AGAINST_FILES += [
    Attack(f"{name} as vLLM reads it: {value!r:.20}", key(name, value), ("config.json", name, "expected"), foreign=True)
    for name, value in (
        ("n_head_kv", 1), ("num_kv_heads", 1), ("hidden_size_per_head", 3), ("max_seq_len", "x"), ("max_seq_len", 2),
        ("dtype", "float8_e4m3fn"), ("dtype", "float64"), ("transformers_version", "4.0\n[red]x"),
        ("model_max_length", -4), ("llm_config", {"hidden_size": 3}), ("text_encoder", {"hidden_size": 3}),
        ("architectures", []), ("architectures", None), ("is_causal", False), ("is_encoder_decoder", True),
        ("layer_types", ["sliding_attention"] * 2),
    )
]  # fmt: skip
AGAINST_FILES += [
    Attack("a model of many layers", another_model("bart", decoder_layers=1 << 20),
           ("config.json", "decoder_layers", "layers"), foreign=True),
    Attack("a model of many experts", another_model("nllb-moe", num_experts=20_000),
           ("config.json", "num_experts", "expected 8 experts"), foreign=True),
    Attack("a model of repeated layers", another_model("gpt_neo", attention_types=[[["global", "local"], 10**8]]),
           ("config.json", "attention_types", "in a list of lists"), foreign=True),
    Attack("a hundred thousand labels", key("id2label", {str(i): "x" for i in range(100_000)}),
           ("config.json", "id2label", "4096 keys"), foreign=True),
    Attack("labels of a part", key("vision_config", {"num_labels": 10**6}),
           ("config.json", "vision_config.num_labels", "labels"), foreign=True),
    Attack("escape in a text", key("use_return_dict", "\x1b[31mno\x07\nerror: second"),
           ("config.json", "use_return_dict", "can be printed", r"\x1b"), foreign=True),
    Attack("a method in config.json", key("validate_rope", 1),
           ("config.json", "validate_rope", "the name of a method"), foreign=True),
    Attack("a special method in config.json", key("__class__", "x"),
           ("config.json", "__class__", "the name of a method"), foreign=True),
    Attack("a thousand layers of one tensor", thousand_layers, ("config.json", "num_hidden_layers", "256 layers")),
    Attack("return_dict of false", key("return_dict", False), ("config.json", "return_dict", "true"), foreign=True),
    Attack("escape in a list", key("tags", ["a", {"b": "\x1b]0;title\x07"}]),
           ("config.json", "tags.b", "can be printed", r"\x1b"), foreign=True),
    Attack("thirty mebibytes of numbers as texts", key("zz", ["1" * 26] * 1_000_000),
           ("config.json", "expected at most 4194304 bytes"), foreign=True),
    Attack("one layer of two", config(lambda it: it.update(num_hidden_layers=1)),
           (SHARD, "tensor model.layers.1.", "expected no such tensor")),
    Attack("half of the width", config(lambda it: it.update(hidden_size=32)), (SHARD, "expected [", "found [")),
    Attack("another vocabulary", config(lambda it: it.update(vocab_size=512)), (SHARD, "expected [512, 64]")),
]  # fmt: skip
"""Sizes in config.json that are not those of the files."""


WIDE = '"experts": {' + ",".join(f'"l{i}": [' + ",".join(["9"] * 900) + "]" for i in range(1000)) + '}, "x": {'
IN_CONFIG = [
    Attack("unknown key in config", ours(lambda it: it.update(surprise=1)),
           ("config.json", "surprise", "not permitted")),
    Attack("unknown key within", ours(lambda it: it["linear"].update(code="x")), ("config.json", "linear.code")),
    Attack("no object", ours(lambda _: [1]), ("config.json",), foreign=True),
    Attack("another version", ours(lambda it: it.update(format_version=3)), ("config.json", "format_version")),
    Attack("true for a number", ours(lambda it: it.update(group_size=True)), ("config.json", "group_size", "True")),
    Attack("endless group size", ours(lambda it: it.update(group_size=10**4000)), ("config.json", "group_size")),
    Attack("width of five bits", ours(lambda it: it["experts"][LAYER].__setitem__(3, 5)),
           ("config.json", f"experts.{LAYER}.3")),
    Attack("width of other words", ours(lambda it: it["experts"][LAYER].__setitem__(3, 3)),
           (SHARD, f"{LAYER}.3.w1.weight_packed", "for 3 bits")),
    Attack("too few experts", ours(lambda it: it["experts"][LAYER].pop() and None),
           ("config.json", LAYER, "expected 8 widths, found 7")),
    Attack("too many experts", ours(lambda it: it["experts"][LAYER].append(1)),
           ("config.json", LAYER, "expected 8 widths, found 9")),
    Attack("model of other experts", config(lambda it: it.update(num_local_experts=4)),
           ("config.json", LAYER, "expected 4 widths, found 8")),
    Attack("list of a hundred thousand widths", ours(lambda it: it["experts"].update({LAYER: [1] * 100_000})),
           ("config.json", LAYER, "4096")),
    Attack("nine hundred thousand mistakes", config_text('"experts": {', WIDE), ("config.json",), foreign=True),
    Attack("a hundred thousand unknown keys", ours(lambda it: it.update({f"k{i}": 1 for i in range(100_000)})),
           ("config.json", "the object", "1024 keys")),
    Attack("twenty thousand layers", ours(lambda it: it["experts"].update({f"l{i}": [1] for i in range(20_000)})),
           ("config.json", "experts", "1024 keys")),
    Attack("number without end", config_text('"group_size": 32', '"group_size": 1e999'), ("config.json", "group_size")),
    Attack("threshold without end", config_text('"quant_method"', f'"odp": {{"{LAYER}": 1e999}}, "quant_method"'),
           ("config.json", f"odp.{LAYER}")),
    Attack("threshold NaN", config_text('"quant_method"', f'"odp": {{"{LAYER}": NaN}}, "quant_method"'),
           ("config.json", f"odp.{LAYER}")),
    Attack("zeta without end", ours(lambda it: it["plan"].update(zeta=float("inf"))), ("config.json", "plan.zeta")),
    Attack("pattern among linears", ours(lambda it: it["unquantized"].append("re:(a+)+$")),
           ("config.json", "unquantized.", "re:(a+)+$")),
    Attack("pattern for a prefix", ours(lambda it: it["experts"].update({"(a+)+$": [1] * 8})),
           ("config.json", "(a+)+$")),
    Attack("bait for patterns", ours(lambda it: it["unquantized"].append("a" * 100_000 + "!")), ("config.json", "512")),
    Attack("projection that is a path", ours(lambda it: it["projections"].update(gate="../w1")),
           ("config.json", "projections.gate")),
    Attack("escape in config", ours(lambda it: it.update(quant_method=f"moeq{ESCAPE}")),
           ("config.json", r"\x1b"), foreign=True),
    Attack("code", config(lambda it: it.update(auto_map={"AutoConfig": "evil.Config"})),
           ("config.json", "auto_map", "expected no such key")),
    Attack("code of the language model",
           config(lambda it: it.update(text_config={"auto_map": {"AutoModel": "evil.M"}})),
           ("config.json", "auto_map"), foreign=True),
    Attack("key twice in config", config_text('"group_size": 32', '"group_size": 64, "group_size": 32'),
           ("config.json", "'group_size' stands twice")),
    Attack("config nested deeply", file("config.json", b'{"a":' * 100_000), ("config.json", "levels"), foreign=True),
    Attack("config nested somewhat", ours(lambda it: it.update(plan=nested(200))),
           ("config.json", "levels"), foreign=True),
    Attack("empty config", file("config.json", b""), ("config.json", "not valid JSON"), foreign=True),
    Attack("config not UTF-8", file("config.json", b'{"\xff": 1}'), ("config.json", "not valid JSON"), foreign=True),
    Attack("config with NUL", file("config.json", b"\x00" * 100), ("config.json", "not valid JSON"), foreign=True),
    Attack("huge sparse config", sparse("config.json", 1 << 40), ("config.json", "expected at most"), foreign=True),
    Attack("config of digits", config_text('"group_size": 32', '"group_size": ' + "9" * 10_000),
           ("config.json", "not valid JSON"), foreign=True),
]  # fmt: skip
