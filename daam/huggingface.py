"""The density adaptive transformer as a model of Hugging Face: saved and loaded, in its Trainer and its pipelines.

Importing this module registers `DATForClassification` with AutoConfig, AutoModel, AutoModelForSequenceClassification,
AutoModelForImageClassification and AutoModelForAudioClassification. It needs the extra `recipes`.

    from transformers import AutoTokenizer, pipeline
    from daam.huggingface import DATForClassification
    from daam.recipes.encoders import find_model

    model = DATForClassification.from_run("runs/daam")  # what daam.recipes.train wrote
    folder = find_model(model.config.encoder_name)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=model.config.limit)
    pipeline("text-classification", model=model, tokenizer=tokenizer, truncation=True)("rain and wind")
    model.save_pretrained("weather")
    DATForClassification.from_pretrained("weather")
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from daam.checks import check_choice
from daam.decoder import ATTENTIONS, DATDecoder
from daam.masks import unwrap
from daam.pooling import LayerPooling
from daam.recipes.cache import DTYPES, add_defaults
from daam.recipes.encoders import identify, load_encoder
from daam.recipes.errors import UserError, extra
from daam.recipes.runs import RunError
from daam.recipes.saved import cache_of, load_model, read_finished
from daam.transformer import LOSSES, classify

with extra():
    import transformers
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

METHODS = (*ATTENTIONS, "daamv2")  # of daam.recipes.train, that train a DATDecoder


class DATConfig(PretrainedConfig):
    """Hold what a `DATForClassification` is, but for its tensors.

    Args:
        encoder_name: of the frozen encoder, as `daam.recipes.encoders.load_encoder` takes it: a folder, a model of the
            hub, or an installed package with one. None: the encoder is included, or given whenever the model is made.
        modality: "text", "vision" or "speech".
        decoder_config: arguments of `DATDecoder`, num_layers and num_features among them; num_classes is num_labels.
        loss: of labels, "cross_entropy" or "focal"; see `DensityAdaptiveTransformer`.
        layers: names of the encoder's layers, where they are not clear; see `LayerPooling`.
        batch_first, embeddings: see `LayerPooling`.
        chosen: which of these layers the decoder gets, counted from 0, the embeddings first; None: all.
        rounding: a dtype that features are rounded to before the decoder gets them, as in a cache of this dtype.
        include_encoder: whether `save_pretrained` saves the encoder's weights, and its config as encoder_config.
        encoder_sha256: of the encoder that encoder_name is to give; None: it is set when that is loaded.
        dtypes: of "encoder" and "decoder" when the model was saved, such as "bfloat16".
        limit: how long examples are at most, tokens or seconds: for those who prepare them, the model does not look.
        kwargs: see `PretrainedConfig`; id2label or num_labels among them.

    Raises:
        UserError: num_classes of decoder_config is not the number of labels.
    """

    model_type = "density_adaptive_transformer"
    keys_to_ignore_at_inference: ClassVar = ["weights", "features"]  # the Trainer predicts logits

    def __init__(
        self, encoder_name: str | None = None, modality: str = "text", decoder_config: dict[str, Any] | None = None,
        loss: str = "cross_entropy", *, layers: str | None = None, batch_first: bool | None = None,
        embeddings: bool = False, chosen: list[int] | None = None, rounding: str | None = None,
        include_encoder: bool = False, encoder_config: dict[str, Any] | None = None, encoder_sha256: str | None = None,
        dtypes: dict[str, str] | None = None, limit: float | None = None, **kwargs: Any,
    ):  # fmt: skip
        self.encoder_name, self.modality, self.loss, self.limit = encoder_name, modality, loss, limit
        self.layers, self.batch_first, self.embeddings = layers, batch_first, embeddings
        self.chosen, self.rounding, self.dtypes = chosen, rounding, dtypes
        self.include_encoder, self.encoder_config, self.encoder_sha256 = include_encoder, encoder_config, encoder_sha256
        self.decoder_config = dict(decoder_config or {})
        classes = self.decoder_config.pop("num_classes", None)
        if classes is not None and kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", classes)
        super().__init__(**kwargs)
        if classes not in (None, self.num_labels):
            raise UserError(
                f"decoder_config has num_classes {classes}, expected the number of labels, {self.num_labels}"
            )
        self.label2id = {name: i for i, name in self.id2label.items()}


@dataclass
class DATOutput(ModelOutput):
    """Hold the results of a `DATForClassification`.

    loss: a number, where labels were given. logits: (batch, classes). weights: of the densities, (batch, layers,
    features), where asked for. features: what the decoder saw, (batch, layers, features).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    features: Tensor | None = None


class DATForClassification(PreTrainedModel):
    """Classify with a frozen encoder and a DAT decoder on its layers (arXiv 2401.11143), as a model of Hugging Face.

    Args:
        config: a `DATConfig`. The encoder that it names, or includes, is loaded; the decoder is drawn at random.
        encoder: a Hugging Face model, or any module that `LayerPooling` takes, instead of the one that config names.
        with_encoder: False leaves the model without its encoder, for `from_pretrained` to add one.

    `save_pretrained` writes config.json and model.safetensors, the decoder alone or with config.include_encoder all of
    the model. `from_pretrained` loads it, with the encoder that config names, or with `encoder=` a module; attributes
    of the config, such as encoder_name, can be replaced there. The encoder is frozen and stays in eval mode, whoever
    trains. Encoder and decoder may have dtypes of their own, which are saved.

    Raises:
        UserError: there is no encoder, or it is not the one that the config was made with; it cannot be included; it
            has other layers than the decoder. EncoderError: see `daam.recipes.encoders.load_encoder`.
        ValueError: an argument of `DATDecoder` or `LayerPooling` does not fit.
    """

    config_class = DATConfig
    accepts_loss_kwargs = False  # the loss is a mean: where the Trainer accumulates gradients it averages them itself

    def __init__(self, config: DATConfig, encoder: nn.Module | None = None, *, with_encoder: bool = True):
        super().__init__(config)
        check_choice("loss", config.loss, LOSSES)
        if missing := [name for name in ("num_layers", "num_features") if name not in config.decoder_config]:
            raise UserError(f"decoder_config is {config.decoder_config}, expected {' and '.join(missing)} in it")
        self.decoder = DATDecoder(**config.decoder_config, num_classes=config.num_labels)
        # with what was left to defaults, which may change; the number of classes is that of the labels
        config.decoder_config = {name: value for name, value in self.decoder.settings.items() if name != "num_classes"}
        self.pooling: LayerPooling | None = None
        if config.include_encoder and config.encoder_config is not None and encoder is None:
            self._attach(self._load(_encoder_from(config.encoder_config)))
        self.post_init()
        if self.pooling is None and (encoder is not None or with_encoder):
            self._attach(self._load(encoder))

    @property
    def encoder(self) -> nn.Module:
        return self.pooling.encoder

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None, input_values: Tensor | None = None,
        input_features: Tensor | None = None, pooling_mask: Tensor | Literal["all"] | None = None,
        labels: Tensor | None = None, return_weights: bool = False, **kwargs: Any,
    ) -> DATOutput:  # fmt: skip
        """Classify a batch, with features in the dtype of the decoder's parameters.

        Args:
            input_ids to input_features: of the encoder, which gets those that it names; numbers in its dtype.
            attention_mask, pooling_mask, kwargs: see `LayerPooling.average`.
            labels: (batch,) of integers, for a loss.
            return_weights: also the densities' weights, where the decoder has some.
        """
        named = {
            "input_ids": input_ids, "token_type_ids": token_type_ids, "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask, "input_values": input_values,
            "input_features": input_features,
        }  # fmt: skip
        taken = inspect.signature(unwrap(self.encoder).forward).parameters  # tokenizers may give more
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        kwargs |= {n: value for n, value in named.items() if value is not None and (takes_all or n in taken)}
        dtype = _dtype_of(self.encoder)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                kwargs[name] = value.to(dtype)
        features = self.pooling(attention_mask=attention_mask, pooling_mask=pooling_mask, **kwargs)
        features = features if self.config.chosen is None else features[:, self.config.chosen]
        features = features if self.config.rounding is None else features.to(getattr(torch, self.config.rounding))
        features = features.to(_dtype_of(self.decoder))
        return DATOutput(**classify(self.decoder, features, self.config.loss, labels, return_weights))

    @classmethod
    def from_run(
        cls, run: str | Path, part: int = 0, *, encoder: nn.Module | str | None = None, include_encoder: bool = False
    ) -> DATForClassification:
        """Return the model that `daam.recipes.train` trained, in eval mode.

        Args:
            run: the folder of a finished run. part: the fold or seed whose decoder is taken.
            encoder: a name, or the encoder itself, instead of the name in the run.
            include_encoder: see `DATConfig`.

        Raises:
            RunError: the run is not finished, has no such part, is broken, of a method without a `DATDecoder`, or of
                features that no cache tells about. UserError, EncoderError: see the class.
        """
        results = read_finished(run)
        if results["method"] not in METHODS:
            raise RunError(f"{run} is a run of {results['method']!r}, expected one with a DATDecoder: "
                           f"{', '.join(METHODS)}")  # fmt: skip
        decoder, about = load_model(run, part), add_defaults(cache_of(results))
        kept = [number - (not about["embeddings"]) for number in about["layer_numbers"]]
        rounding = str(DTYPES[about["dtype"]]).removeprefix("torch.")
        config = cls.config_class(
            encoder if isinstance(encoder, str) else about["encoder"], about["modality"], decoder.settings,
            results["settings"]["loss"], layers=about.get("layer_list"), embeddings=about["embeddings"],
            batch_first=(about.get("checked") or {}).get("batch_first"),
            chosen=[kept[i] for i in results["settings"]["layers"] or range(len(kept))],
            rounding=None if rounding == "float32" else rounding, include_encoder=include_encoder,
            encoder_sha256=about.get("encoder_sha256"), limit=about.get("max_length", about.get("max_seconds")),
            id2label=dict(enumerate(results["names"])),
        )  # fmt: skip
        model = cls(config, None if isinstance(encoder, str) else encoder)
        model.decoder.load_state_dict(decoder.state_dict())
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, encoder: nn.Module | None = None, **kwargs: Any) -> Any:
        """Load a model that `save_pretrained` wrote, in eval mode, with the encoder that it names or includes.

        args, kwargs: see `PreTrainedModel.from_pretrained`; a dtype is that of encoder and decoder. encoder: a module
        instead of the one that the config names.
        """
        found = super().from_pretrained(*args, with_encoder=False, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if model.pooling is None or encoder is not None:
            model._attach(model._load(encoder))
        given = kwargs.get("dtype", kwargs.get("torch_dtype"))
        for name, module in (("encoder", model.encoder), ("decoder", model.decoder)):
            saved = (model.config.dtypes or {}).get(name)
            dtype = saved if given in (None, "auto") else given
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            if dtype not in (None, _dtype_of(module)):  # a cast to its own would change buffers that are kept wider
                module.to(dtype)
        model.pooling.to(model.device).requires_grad_(False)  # loading makes parameters anew, which require a gradient
        model.eval()
        return found

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; see `PreTrainedModel.save_pretrained`."""
        modules = {"encoder": self.encoder, "decoder": self.decoder}
        self.config.dtypes = {name: str(_dtype_of(module)).removeprefix("torch.") for name, module in modules.items()}
        super().save_pretrained(*args, **kwargs)

    def _load(self, encoder: nn.Module | None) -> LayerPooling:
        """Return the layers of an encoder, or of the one that the config names, if that is the right one."""
        config = self.config
        if encoder is not None:
            return LayerPooling(encoder, config.layers, config.batch_first, config.embeddings)
        if config.encoder_name is None:
            raise UserError("encoder_name of the config is None, expected a name or a path: or pass encoder=")
        pooling, collate = load_encoder(config.encoder_name, config.modality, config.layers)
        found = identify(pooling, collate)["encoder_sha256"]
        if config.encoder_sha256 not in (None, found):
            raise UserError(
                f"encoder {config.encoder_name!r} has SHA-256 {found[:12]}…, expected {config.encoder_sha256[:12]}…: "
                "its weights, or its config, are not those that the decoder was trained with; pass encoder_name= the "
                "right one, or encoder_sha256=None to take this one all the same"
            )
        config.encoder_sha256 = found
        pooling.batch_first, pooling.embeddings = config.batch_first, config.embeddings
        return pooling

    def _attach(self, pooling: LayerPooling) -> None:
        """Take an encoder with its layers, and settle what of it is saved."""
        config, encoder = self.config, unwrap(pooling.encoder)
        expected = pooling.num_layers if config.chosen is None else len(config.chosen)
        if config.decoder_config["num_layers"] != expected:
            found = config.decoder_config["num_layers"]
            raise UserError(f"decoder_config has num_layers {found}, expected {expected}, those that the decoder gets")
        self.pooling, self.main_input_name = pooling, getattr(encoder, "main_input_name", self.main_input_name)
        if not config.include_encoder:
            self._keys_to_ignore_on_save = {f"pooling.{key}" for key in pooling.state_dict()}
        else:
            config.encoder_config = _config_of(encoder)
            if config.layers is not None:  # by their names in the encoder, which may be a part of what was named
                names = {module: name for name, module in encoder.named_modules()}
                config.layers = ",".join(names[layer] for layer in pooling.layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a file lacks; the encoder does so itself."""
        # what only holds other modules would reset loaded ones; of a module itself torch.nn.init spares what is loaded
        if hasattr(module, "reset_parameters") and [*module.parameters(False), *module.buffers(False)]:
            module.reset_parameters()


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _encoder_from(config: dict[str, Any]) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(**config))


def _config_of(encoder: nn.Module) -> dict[str, Any]:
    """Return the config of an encoder that it can be built from; raise a UserError where there is none."""
    problem = "it is no model of Hugging Face"
    if isinstance(encoder, PreTrainedModel):
        config = encoder.config.to_dict()
        with torch.device("meta"):
            twin = _encoder_from(config)
        shapes, expected = ({k: t.shape for k, t in model.state_dict().items()} for model in (encoder, twin))
        if type(twin) is type(encoder) and shapes == expected:
            return config
        problem = f"it is a {type(encoder).__name__}, and its config gives a {type(twin).__name__}"
    raise UserError(f"include_encoder is True, but this encoder cannot be included: {problem}; name it instead")


AutoConfig.register(DATConfig.model_type, DATConfig, exist_ok=True)
for task in ("", "ForSequenceClassification", "ForImageClassification", "ForAudioClassification"):
    getattr(transformers, f"AutoModel{task}").register(DATConfig, DATForClassification, exist_ok=True)
