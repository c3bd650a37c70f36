"""Everything that is wrong with an upload is said precisely, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_adapters.errors import (
    DigestMismatch,
    InvalidConfig,
    InvalidName,
    InvalidTensors,
    InvalidUpload,
    RankTooLarge,
    UnsupportedAdapter,
    UploadTooLarge,
)
from onebase_adapters.peft_format import parse

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


class Upload:
    """What is sent; each case below spoils one thing of it."""

    def __init__(self, tensors: dict, tmp_path: Path) -> None:
        self.tensors = tensors
        self.directory = tmp_path / "peft"
        self.config = {}
        self.name = "pirate"
        self.after_writing = lambda: None
        self.expected_sha256 = None

    @property
    def weights(self) -> Path:
        return self.directory / "adapter_model.safetensors"

    def set(self, **config) -> None:
        self.config.update(config)

    def rename(self, old: str, new: str) -> None:
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}

    def replace(self, side: str, tensor: np.ndarray) -> None:
        self.tensors[f"{Q0}.lora_{side}.weight"] = tensor

    def become_ia3(self, shape: tuple[int, int] = (32, 1), **config) -> None:
        self.config = {"peft_type": "IA3", "r": None, "lora_alpha": None, **config}
        self.tensors = {f"{Q0}.ia3_l": np.ones(shape, "f4")}

    def become_vera(self, without: tuple[str, ...] = (), **config) -> None:
        self.config = {"peft_type": "VERA", "lora_alpha": None, **config}
        shapes = {
            "base_model.vera_A": (4, 32),
            "base_model.vera_B": (32, 4),
            f"{Q0}.vera_lambda_b": (32,),
            f"{Q0}.vera_lambda_d": (4,),
        }
        self.tensors = {name: np.ones(shape, "f4") for name, shape in shapes.items() if name not in without}

    def add(self, **shapes: tuple[int, ...]) -> None:
        self.tensors |= {name: np.ones(shape, "f4") for name, shape in shapes.items()}

    def adapt_head(self, **config) -> None:
        self.set(target_modules=["q_proj", "v_proj", "lm_head"], **config)
        self.add(**{f"{HEAD}.lora_A.weight": (4, 32), f"{HEAD}.lora_B.weight": (20, 4)})

    def write_config(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        self.after_writing = lambda: (self.directory / "adapter_config.json").write_bytes(data)

    def then(self, action) -> None:
        self.after_writing = action


def _only_pickle(upload: Upload) -> None:
    upload.then(lambda: upload.weights.rename(upload.directory / "adapter_model.bin"))


def _truncate(upload: Upload) -> None:
    upload.then(lambda: upload.weights.write_bytes(upload.weights.read_bytes()[:-1]))


def _not_a_number(upload: Upload) -> None:
    upload.tensors[f"{Q0}.lora_B.weight"][3, 1] = np.nan


def _infinite_half(upload: Upload) -> None:
    upload.tensors = {name: tensor.astype(np.float16) for name, tensor in upload.tensors.items()}
    upload.tensors[f"{Q0}.lora_A.weight"][0, 0] = np.inf


def _one_half(upload: Upload) -> None:
    upload.replace("A", np.ones((4, 32), np.float16))


def _too_large(upload: Upload) -> None:
    upload.then(lambda: upload.weights.open("ab").truncate(2 << 30))  # sparse: takes no room


CASES = {
    # names and digests
    "empty name": (lambda u: setattr(u, "name", ""), InvalidName, "cannot name an adapter"),
    "name with a path": (lambda u: setattr(u, "name", "../pirate"), InvalidName, r"\.\./pirate"),
    "name with a line end": (lambda u: setattr(u, "name", "pirate\n"), InvalidName, r"pirate\\n"),
    "name too long": (lambda u: setattr(u, "name", "a" * 129), InvalidName, "128"),
    "announced digest": (lambda u: setattr(u, "expected_sha256", "0" * 64), DigestMismatch, "0000 was announced"),
    "too many bytes": (_too_large, UploadTooLarge, "at most 1073741824"),
    # files
    "no config": (
        lambda u: u.then(lambda: (u.directory / "adapter_config.json").unlink()),
        InvalidConfig,
        "no adapter_config.json",
    ),
    "no weights": (lambda u: u.then(u.weights.unlink), InvalidTensors, "no adapter_model.safetensors"),
    "pickle": (_only_pickle, InvalidTensors, "adapter_model.bin may hold a pickle.*safe_serialization=True"),
    "no directory": (lambda u: setattr(u, "directory", u.directory / "nowhere"), InvalidConfig, "not a directory"),
    # adapter_config.json
    "not JSON": (lambda u: u.write_config("{"), InvalidConfig, "not valid JSON"),
    "not UTF-8": (lambda u: u.write_config(b'{"\xff": 1}'), InvalidConfig, "not valid JSON"),
    "not an object": (lambda u: u.write_config("[]"), InvalidConfig, "JSON object, not a list"),
    "config too large": (lambda u: u.write_config(" " * 300_000), InvalidConfig, "larger than 262144"),
    "no type": (lambda u: u.set(peft_type=None), InvalidConfig, "peft_type"),
    "other type": (lambda u: u.set(peft_type="LOHA"), UnsupportedAdapter, "'LOHA'"),
    "no rank": (lambda u: u.set(r=None), InvalidConfig, "r should be a positive integer, not None"),
    "rank 0": (lambda u: u.set(r=0), InvalidConfig, "r should be a positive integer, not 0"),
    "rank as text": (lambda u: u.set(r="4"), InvalidConfig, "not '4'"),
    "rank true": (lambda u: u.set(r=True), InvalidConfig, "not True"),
    "no alpha": (lambda u: u.set(lora_alpha=None), InvalidConfig, "lora_alpha"),
    "alpha NaN": (lambda u: u.set(lora_alpha=float("nan")), InvalidConfig, "lora_alpha should be a finite number"),
    "alpha endless": (lambda u: u.set(lora_alpha=10**400), InvalidConfig, "lora_alpha should be a finite number"),
    "rslora as text": (lambda u: u.set(use_rslora="yes"), InvalidConfig, "use_rslora"),
    "pattern not a map": (lambda u: u.set(rank_pattern=["q_proj"]), InvalidConfig, "rank_pattern"),
    "pattern's rank": (lambda u: u.set(rank_pattern={"q_proj": -1}), InvalidConfig, r"rank_pattern\['q_proj'\]"),
    "pattern's alpha": (lambda u: u.set(alpha_pattern={"q_proj": None}), InvalidConfig, r"alpha_pattern\['q_proj'\]"),
    "pattern's syntax": (lambda u: u.set(alpha_pattern={"(q_proj": 1}), InvalidConfig, "invalid pattern"),
    "targets' syntax": (lambda u: u.set(target_modules="*_proj"), InvalidConfig, "invalid pattern"),
    "targets a number": (lambda u: u.set(target_modules=3), InvalidConfig, "target_modules"),
    **{
        f"option {option}": ((lambda o, v: lambda u: u.set(**{o: v}))(option, value), UnsupportedAdapter, option)
        for option, value in {
            "layer_replication": [[0, 2], [1, 3]],
            "use_bdlora": {"nblocks": 2},
            "arrow_config": {"top_k": 3},
            "kasa_config": {"beta": 1.0},
            "monteclora_config": {"samples": 8},
            "an_option_of_tomorrow": 0,
        }.items()
    },
    **{
        f"base of {initialisation}": (
            (lambda v: lambda u: u.set(init_lora_weights=v))(initialisation),
            UnsupportedAdapter,
            f"init_lora_weights '{initialisation}' changes the base's weights",
        )
        for initialisation in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "bias as number": (lambda u: u.set(bias=1), InvalidConfig, "bias should be one of none, all, lora_only, not 1"),
    "dora with lora_bias": (
        lambda u: u.set(use_dora=True, lora_bias=True),
        UnsupportedAdapter,
        "both use_dora and lora_bias",
    ),
    "dora with qalora": (
        lambda u: u.set(use_dora=True, use_qalora=True, qalora_group_size=8),
        UnsupportedAdapter,
        "both use_dora and use_qalora",
    ),
    "group size that leaves a rest": (
        lambda u: u.set(use_qalora=True, qalora_group_size=7),
        InvalidConfig,
        "qalora_group_size 7 does not divide the 32 inputs",
    ),
    "alora without tokens": (
        lambda u: u.set(alora_invocation_tokens=[]),
        InvalidConfig,
        "alora_invocation_tokens should be a list of token ids",
    ),
    "alora of text": (
        lambda u: u.set(alora_invocation_tokens="<now>"),
        InvalidConfig,
        "list of token ids, not '<now>'",
    ),
    "alora with dora": (
        lambda u: u.set(alora_invocation_tokens=[7], use_dora=True),
        UnsupportedAdapter,
        "both alora_invocation_tokens and use_dora",
    ),
    "no group size": (lambda u: u.set(use_qalora=True), InvalidConfig, "qalora_group_size"),
    "pooling": (lambda u: u.set(qalora_pooling="max"), InvalidConfig, "qalora_pooling should be one of mean, sum"),
    "layers as text": (lambda u: u.set(layers_to_transform="1"), InvalidConfig, "layers_to_transform"),
    "layers' pattern a number": (lambda u: u.set(layers_pattern=3), InvalidConfig, "layers_pattern"),
    "excluded": (
        lambda u: u.set(exclude_modules=["layers.1.self_attn.q_proj"]),
        InvalidTensors,
        r"layers\.1\.self_attn\.q_proj, but exclude_modules names it",
    ),
    "layer left out": (
        lambda u: u.set(layers_to_transform=[0, 2]),
        InvalidTensors,
        r"layers\.1\..*but layers_to_transform leaves its layer out",
    ),
    "no magnitudes": (lambda u: u.set(use_dora=True), InvalidTensors, "no lora_magnitude_vector for"),
    "no lora_bias": (lambda u: u.set(lora_bias=True), InvalidTensors, "no lora_bias for"),
    **{
        f"{ending} with its option off": (
            (lambda name: lambda u: u.tensors.update({f"{Q0}.{name}": np.ones(32, "f4")}))(ending),
            InvalidTensors,
            f"There is {Q0}.{ending}, but adapter_config.json has the option off",
        )
        for ending in ("lora_magnitude_vector", "lora_B.bias", "base_layer.bias")
    },
    "magnitudes of another base": (
        lambda u: (u.set(use_dora=True), u.tensors.update({f"{Q0}.lora_magnitude_vector": np.ones(31, "f4")})),
        InvalidTensors,
        r"lora_magnitude_vector has shape \[31\].*\[32\]",
    ),
    # other kinds
    "feedforward with a shared input": (
        lambda u: u.become_ia3(feedforward_modules=["q_proj"]),
        UnsupportedAdapter,
        "feedforward_modules names model.layers.0.self_attn.q_proj",
    ),
    "ia3 with modules_to_save": (
        lambda u: u.become_ia3(modules_to_save=["lm_head"]),
        UnsupportedAdapter,
        "modules_to_save",
    ),
    "ia3 of another base": (lambda u: u.become_ia3(shape=(31, 1)), InvalidTensors, r"ia3_l has shape \[31, 1\]"),
    "vera without projections": (
        lambda u: u.become_vera(("base_model.vera_A",)),
        InvalidTensors,
        "no base_model.vera_A and base_model.vera_B.*save_projection=True",
    ),
    "vera of a larger base": (lambda u: u.become_vera(r=5), InvalidTensors, r"vera_A has shape \[4, 32\].*\[5, 32\]"),
    "vera with biases": (lambda u: u.become_vera(bias="vera_only"), UnsupportedAdapter, "bias = 'vera_only'"),
    "vera's rank over the limit": (lambda u: u.become_vera(r=65), RankTooLarge, "r is 65"),
    # tensors
    "not safetensors": (lambda u: u.then(lambda: u.weights.write_bytes(b"PK\3\4" * 9)), InvalidTensors, "not a safe"),
    "empty file": (lambda u: u.then(lambda: u.weights.write_bytes(b"")), InvalidTensors, "truncated"),
    "truncated": (_truncate, InvalidTensors, "truncated"),
    "no tensor": (lambda u: setattr(u, "tensors", {}), InvalidTensors, "holds no tensor"),
    "nothing matches": (lambda u: u.rename("layers", "blocks"), InvalidTensors, r"blocks\.0.*no linear of this base"),
    "unknown module": (lambda u: u.rename("v_proj", "w_proj"), InvalidTensors, r"self_attn\.w_proj.*no linear"),
    "head": (lambda u: u.tensors.update({"base_model.model.lm_head.weight": np.ones(2)}), InvalidTensors, "float"),
    # embedding and head
    "embedding of another base": (
        lambda u: u.add(**{f"{EMBEDDING}.lora_embedding_A": (4, 9), f"{EMBEDDING}.lora_embedding_B": (31, 4)}),
        InvalidTensors,
        "embed_tokens, but target_modules does not name it",
    ),
    "head that is not targeted": (
        lambda u: (u.adapt_head(), u.set(target_modules="all-linear")),
        InvalidTensors,
        "lm_head, but target_modules does not name it",
    ),
    "head of another base": (
        lambda u: (u.adapt_head(), u.add(**{f"{HEAD}.lora_A.weight": (4, 31)})),
        InvalidTensors,
        r"lm_head\.lora_A\.weight has shape \[4, 31\].*\[4, 32\]",
    ),
    "head's rank over the limit": (
        lambda u: u.adapt_head(rank_pattern={"lm_head": 65}),
        RankTooLarge,
        "lm_head has rank 65",
    ),
    "dora on the head": (lambda u: u.adapt_head(use_dora=True), UnsupportedAdapter, "use_dora.*LoRA on lm_head"),
    "lora_bias on the head": (lambda u: u.adapt_head(lora_bias=True), UnsupportedAdapter, "lora_bias.*on lm_head"),
    "alora on the head": (
        lambda u: u.adapt_head(alora_invocation_tokens=[7]),
        UnsupportedAdapter,
        "alora_invocation_tokens.*changes of embed_tokens, lm_head",
    ),
    "embedding in half without its other half": (
        lambda u: (
            u.set(target_modules=["embed_tokens", "q_proj", "v_proj"]),
            u.add(**{f"{EMBEDDING}.lora_embedding_A": (4, 20)}),
        ),
        InvalidTensors,
        "no lora_B for model.embed_tokens",
    ),
    "saved linear": (lambda u: u.set(modules_to_save=["q_proj"]), UnsupportedAdapter, "modules_to_save names q_proj"),
    "saved names": (lambda u: u.set(modules_to_save="lm_head"), InvalidConfig, "modules_to_save should be a list"),
    "saved, but not there": (
        lambda u: u.set(modules_to_save=["lm_head"]),
        InvalidTensors,
        "modules_to_save names lm_head, but there is no lm_head.weight",
    ),
    "there, but not saved": (
        lambda u: u.add(**{f"{HEAD}.modules_to_save.weight": (20, 32)}),
        InvalidTensors,
        "modules_to_save.weight, but modules_to_save does not name lm_head",
    ),
    "saved of another base": (
        lambda u: (u.set(modules_to_save=["lm_head"]), u.add(**{f"{HEAD}.weight": (20, 31)})),
        InvalidTensors,
        r"lm_head\.weight has shape \[20, 31\].*\[20, 32\]",
    ),
    "norm that is not saved": (
        lambda u: u.add(**{"base_model.model.model.norm.weight": (32,)}),
        InvalidTensors,
        r"model\.norm\.weight, but modules_to_save does not name model\.norm",
    ),
    "norm of another base": (
        lambda u: (u.set(modules_to_save=["norm"]), u.add(**{"base_model.model.model.norm.weight": (31,)})),
        InvalidTensors,
        r"norm\.weight has shape \[31\].*\[32\]",
    ),
    "bias of a norm without": (
        lambda u: (u.set(bias="all"), u.add(**{"base_model.model.model.norm.bias": (32,)})),
        InvalidTensors,
        r"norm\.bias, but the norms of this base have no bias",
    ),
    "norm of a layer too high": (
        lambda u: (
            u.set(modules_to_save=["norm"]),
            u.add(**{"base_model.model.model.layers.3.input_layernorm.weight": (32,)}),
        ),
        InvalidTensors,
        r"layers\.3\.input_layernorm.*no linear of this base",
    ),
    "alora with a norm": (
        lambda u: (
            u.set(modules_to_save=["norm"], alora_invocation_tokens=[7]),
            u.add(**{"base_model.model.model.norm.weight": (32,)}),
        ),
        UnsupportedAdapter,
        "alora_invocation_tokens.*norms",
    ),
    "token ids that are none": (lambda u: u.set(trainable_token_indices=[1, -1]), InvalidConfig, "different token ids"),
    "token ids twice": (lambda u: u.set(trainable_token_indices=[1, 1]), InvalidConfig, "different token ids"),
    "token ids of a linear": (
        lambda u: u.set(trainable_token_indices={"q_proj": [1]}),
        UnsupportedAdapter,
        "trainable_token_indices names q_proj",
    ),
    "token ids without vectors": (
        lambda u: u.set(trainable_token_indices=[1]),
        InvalidTensors,
        "names embed_tokens, but there is no trainable_tokens_delta for model.embed_tokens",
    ),
    "vectors without token ids": (
        lambda u: u.add(**{f"{HEAD}.token_adapter.trainable_tokens_delta": (1, 32)}),
        InvalidTensors,
        "trainable_tokens_delta, but trainable_token_indices does not name lm_head",
    ),
    "more token ids than vectors": (
        lambda u: (
            u.set(trainable_token_indices=[1, 2]),
            u.add(**{f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 32)}),
        ),
        InvalidTensors,
        r"trainable_tokens_delta has shape \[1, 32\].*\[2, 32\]",
    ),
    "a new token without a vector": (
        lambda u: (
            u.set(trainable_token_indices=[21]),
            u.add(**{f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 32)}),
        ),
        InvalidTensors,
        "22 tokens, 2 more than the base, but 1 of them have a vector in embed_tokens; save.*save_embedding_layers",
    ),
    "new tokens in the head alone": (
        lambda u: u.add(**{f"{HEAD}.weight": (22, 32)}),
        InvalidTensors,
        "22 tokens, 2 more than the base, but 0 of them have a vector in embed_tokens",
    ),
    "a vocabulary of two sizes": (
        lambda u: u.add(**{f"{EMBEDDING}.weight": (22, 32), f"{HEAD}.weight": (23, 32)}),
        InvalidTensors,
        r"lm_head\.weight has shape \[23, 32\].*\[22, 32\]",
    ),
    "a vocabulary without tokens": (
        lambda u: u.add(**{f"{EMBEDDING}.weight": (0, 32)}),
        InvalidTensors,
        "has 0 tokens; this server carries 1 to 65556",
    ),
    "a vocabulary beyond reason": (
        lambda u: u.add(**{f"{EMBEDDING}.lora_embedding_A": (1, 65557)}),
        InvalidTensors,
        "has 65557 tokens; this server carries 1 to 65556",
    ),
    "vision tower": (lambda u: u.rename("model.layers", "vision_tower.layers"), InvalidTensors, "vision_tower"),
    "wrong block": (lambda u: u.rename("self_attn.q_proj", "mlp.q_proj"), InvalidTensors, r"mlp\.q_proj.*no linear"),
    "layer too high": (lambda u: u.rename("layers.2", "layers.3"), InvalidTensors, r"layers\.3.*layers 0 to 2"),
    "not targeted": (lambda u: u.set(target_modules=["q_proj"]), InvalidTensors, "target_modules does not name it"),
    "A without B": (lambda u: u.tensors.pop(f"{Q0}.lora_B.weight"), InvalidTensors, f"no lora_B for {Q0[17:]}"),
    "two adapters": (
        lambda u: u.tensors.update({f"{Q0}.lora_A.other.weight": np.ones((4, 32), "f4")}),
        InvalidTensors,
        "for the same matrix",
    ),
    "other base": (
        lambda u: u.replace("A", np.ones((4, 64), "f4")),
        InvalidTensors,
        r"q_proj\.lora_A\.weight has shape \[4, 64\].*\[4, 32\]",
    ),
    "other rank": (lambda u: u.set(r=8), InvalidTensors, r"has shape \[4, 32\].*\[8, 32\]"),
    "rank over the limit": (lambda u: u.set(r=65), RankTooLarge, "rank 65, but this server allows at most 64"),
    "rank beyond reason": (lambda u: u.set(r=10**400), RankTooLarge, "at most 64"),
    "NaN": (_not_a_number, InvalidTensors, r"q_proj\.lora_B\.weight holds NaN"),
    "infinity": (_infinite_half, InvalidTensors, r"q_proj\.lora_A\.weight holds NaN or inf"),
    "integers": (lambda u: u.replace("A", np.ones((4, 32), np.int8)), InvalidTensors, "is I8"),
    "two dtypes": (_one_half, InvalidTensors, "lora_A in float16 but lora_B in float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_what_is_wrong_and_changes_nothing(case, store, write_peft, tensors, tmp_path):
    spoil, error, message = CASES[case]
    store.publish("pirate", write_peft(name="good"))
    before = store.list_adapters(), sorted(store.root.rglob("blobs/*"))

    upload = Upload(tensors, tmp_path)
    write_peft(name="peft")
    spoil(upload)
    write_peft(upload.tensors, **upload.config)
    upload.after_writing()
    with pytest.raises(error, match=message) as caught:
        store.publish(upload.name, upload.directory, expected_sha256=upload.expected_sha256)

    assert isinstance(caught.value, InvalidUpload)
    assert str(caught.value).endswith(".")
    assert (store.list_adapters(), sorted(store.root.rglob("blobs/*"))) == before
    assert not list((store.root / "staging").iterdir())
    assert store.verify().is_clean


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "VeraConfig"])
def test_every_option_that_peft_writes_is_either_carried_or_refused_on_purpose(kind, tmp_path, tensors, layout):
    """A default configuration passes, whatever version of PEFT is installed: what is then missed are tensors."""
    peft = pytest.importorskip("peft")

    getattr(peft, kind)(target_modules=["q_proj"]).save_pretrained(tmp_path)
    save_file({f"{Q0}.unknown": np.ones(1, "f4")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidTensors):
        parse(tmp_path, layout, max_rank=256)
