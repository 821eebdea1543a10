"""A language model that reads regions: frozen TAP, a projector, and any causal LM of Transformers.

The LLM is kept whole, head included, so that whatever it does to its logits stays its own business. Image and region
tokens take the place of placeholders in its input embeddings; text without placeholders goes through untouched.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import InputError
from ..tap.modeling_tap import TapModel
from .configuration_tap_llm import TapLlmConfig
from .features import RegionFeatures, extract_features
from .joining import argument_names, check_parts, embedding_rms, name_of, shared_config
from .placeholders import cached_length, gather_parts, placeholder_mask, prepared_rows
from .projectors import BoxPosition, FeatureMlp, RegionProjector, find_projector

# What `generate` turns into tokens before its loop; `forward` takes all of them but image embeddings.
FEATURE_INPUTS = ("pixel_values", "image_embeddings", "input_points", "input_labels", "region_image_index",
                  "resized_sizes", "part_index", "region_features")  # fmt: skip


class TapLlmPreTrainedModel(PreTrainedModel):
    """Base of the region language models."""

    config: TapLlmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RegionProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True  # asked of every part
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureMlp | BoxPosition):
            module.init_weights()

    def enable_input_require_grads(self) -> None:
        """Of the LLM alone: TAP runs without gradients, and its owner may use it elsewhere."""
        self._body().language_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo it."""
        self._body().language_model.disable_input_require_grads()

    def _body(self) -> Any:
        """The [`TapLlmModel`]."""
        return getattr(self, "model", self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; raises InputError while there are adapters, whose weights would be mixed up with it."""
        if any(getattr(part, "_hf_peft_config_loaded", False) for part in self.modules()):
            raise InputError("the model holds adapters: save them with save_adapter, or merge(model) before saving it")
        super().save_pretrained(save_directory, *args, **kwargs)


class TapLlmModel(TapLlmPreTrainedModel):
    """TAP, projector and LLM; its `forward` gives the LLM's hidden states."""

    def __init__(self, config: TapLlmConfig) -> None:
        super().__init__(config)
        self.tap = TapModel._from_config(config.tap_config)
        self.tap.requires_grad_(False)
        self.projector: RegionProjector = find_projector(config.projector)(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of projector and LLM; TAP always stays frozen and in eval mode."""
        super().train(mode)
        self.tap.eval().requires_grad_(False)  # here too: loading makes new parameters, and ends with eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the LLM."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the LLM."""
        self.language_model.set_input_embeddings(value)

    def extract_features(self, **tensors: Any) -> RegionFeatures:
        """What TAP knows of the regions, as much of it as the projector reads; arguments as [`extract_features`]."""
        reads = find_projector(self.config.projector)
        return extract_features(
            self.tap,
            roi_grid=self.config.roi_grid if reads.uses_roi else 0,
            global_grid=self.config.global_grid if reads.uses_global else 0,
            **tensors,
        )

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        region_image_index: Tensor | None = None,
        resized_sizes: Tensor | None = None,
        part_index: Tensor | None = None,
        region_features: RegionFeatures | None = None,
        image_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Image and region tokens, one row per placeholder.

        Args:
            pixel_values: (B, 3, S, S); or `image_embeddings` (B, D, G, G), or `region_features` in place of all.
            input_points: (N, n, 2) in canvas pixels.
            input_labels: (N, n).
            region_image_index: (N,).
            resized_sizes: (B, 2).
            part_index: (M,) parts of the text in their order: region i is i, image k is -1 - k. None: all regions in
                the order of their rows, where images cost no tokens.
            region_features: what was extracted before; never modified.
            image_embeddings: (B, D, G, G).
            kwargs: ignored.

        Returns:
            `pooler_output`: list of (1, d), in the order of placeholders over (batch, sequence); `last_hidden_state`:
            (B, m, d) tokens of the images.

        Raises:
            ValueError: inputs that do not fit together.
        """
        if region_features is None:
            region_features = self.extract_features(
                pixel_values=pixel_values,
                input_points=input_points,
                input_labels=input_labels,
                region_image_index=region_image_index,
                resized_sizes=resized_sizes,
                image_embeddings=image_embeddings,
            )
        elif pixel_values is not None or image_embeddings is not None:
            raise ValueError("give either region_features or images, not both")
        weight = next(self.projector.parameters())
        region_rows, image_rows = self.projector(region_features.to(weight.device, weight.dtype))
        rows = gather_parts(region_rows, image_rows, part_index)
        return BaseModelOutputWithPooling(last_hidden_state=image_rows, pooler_output=list(rows.split(1)))

    def feature_rows(self, **features: Any) -> list[Tensor]:
        """Rows of [`TapLlmModel.get_image_features`]; none, at no cost, where nothing would be read of the images."""
        given = {name for name in FEATURE_INPUTS if features.get(name) is not None}
        regions = next((features[name] for name in ("region_features", "input_points") if name in given), ())
        if not given or not (len(regions) or self.config.tokens_per_image):
            return []
        return self.get_image_features(**features).pooler_output  # type: ignore[return-value]

    def embed(self, input_ids: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Token embeddings (B, L, d) of ids (B, L), with rows (1, d) in the place of placeholders.

        Raises:
            ValueError: another number of rows than of placeholders.
        """
        embeds = self.get_input_embeddings()(input_ids)
        mask = placeholder_mask(input_ids, self.config.region_token_id, len(rows))
        if not rows:
            return embeds
        values = torch.cat(list(rows)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(mask.to(embeds.device).unsqueeze(-1), values)

    def text_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        **features: Any,
    ) -> dict[str, Tensor | None]:
        """What the LLM reads: ids as they are where there is no region, else embeddings."""
        rows = prepared_rows(mm_encoder_outputs) or self.feature_rows(**features)
        if rows and inputs_embeds is not None:
            raise ValueError("images and regions need input_ids: inputs_embeds do not tell where they belong")
        if inputs_embeds is not None or input_ids is None:
            return {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if not rows:
            if input_ids.shape[1] > 1:  # a decoding step needs no look: placeholders are never generated
                placeholder_mask(input_ids, self.config.region_token_id, 0)
            return {"input_ids": input_ids}
        return {"inputs_embeds": self.embed(input_ids, rows)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of the LLM's transformer; arguments as [`TapLlmForConditionalGeneration.forward`]."""
        features = {name: kwargs.pop(name, None) for name in FEATURE_INPUTS}
        kwargs.pop("original_sizes", None)
        text = self.text_inputs(input_ids, inputs_embeds, mm_encoder_outputs, **features)
        return self.language_model.base_model(**text, attention_mask=attention_mask, **kwargs)


class TapLlmForConditionalGeneration(TapLlmPreTrainedModel, GenerationMixin):
    """A conversation about regions: TAP, projector and LLM, with loss and generation."""

    def __init__(self, config: TapLlmConfig) -> None:
        super().__init__(config)
        self.model = TapLlmModel(config)
        self.post_init()

    @classmethod
    def from_tap_and_llm(cls, tap: Any, llm: Any, projector: str = "base", **settings: Any) -> Self:
        """Join two loaded models, without copying a weight; the projector is new.

        TAP is frozen (its parameters stop requiring gradients) and its caption decoder is left out.

        Args:
            tap: a [`TapModel`] or [`TapForConditionalGeneration`].
            llm: any causal LM, as `AutoModelForCausalLM` loads it.
            projector: "lite", "base", "full", or a registered name.
            settings: further fields of [`TapLlmConfig`], such as `region_token_id`.

        Returns:
            The joined model in eval mode, the projector beside the LLM's embeddings in their dtype.

        Raises:
            InputError: not a TAP, not a causal LM with an embedding as wide as its layers, or an unknown projector.
        """
        body = check_parts(tap, llm)
        find_projector(projector)
        settings = {"tap_name_or_path": name_of(tap), "llm_name_or_path": name_of(llm), **settings}
        config = TapLlmConfig(
            tap_config=shared_config(body),
            text_config=llm.config,
            projector=projector,
            embedding_rms=embedding_rms(llm),
            **settings,
        )
        with torch.device("meta"):  # a frame without memory: its parts are put in below
            model = cls(config)
        table = llm.get_input_embeddings().weight
        model.model.tap, model.model.language_model = body.requires_grad_(False), llm
        model.model.projector.to_empty(device=table.device).apply(model._init_weights)
        model.model.projector.to(table.dtype)
        model.generation_config = deepcopy(llm.generation_config)
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the LLM."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the LLM."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Output layer of the LLM."""
        return self.model.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the LLM."""
        self.model.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Transformer of the LLM."""
        return self.model.language_model.base_model

    def extract_features(self, **tensors: Any) -> RegionFeatures:
        """See [`TapLlmModel.extract_features`]."""
        return self.model.extract_features(**tensors)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`TapLlmModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        region_image_index: Tensor | None = None,
        original_sizes: Tensor | None = None,
        resized_sizes: Tensor | None = None,
        part_index: Tensor | None = None,
        region_features: RegionFeatures | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next tokens; takes all that [`TapLlmProcessor`] returns.

        Args:
            input_ids: (B, L) with one placeholder per image and region token; or `inputs_embeds`.
            attention_mask: (B, S) 1 for tokens, 0 for padding.
            position_ids: (B, L).
            past_key_values: the LLM's cache; features then belong to the placeholders of the ids given here.
            inputs_embeds: (B, L, d), in place of ids, without images and regions.
            pixel_values: see [`TapLlmModel.get_image_features`], as all up to `region_features`.
            input_points: (N, n, 2).
            input_labels: (N, n).
            region_image_index: (N,).
            original_sizes: accepted and unused.
            resized_sizes: (I, 2).
            part_index: (M,).
            region_features: in place of pixels and prompts; never modified.
            mm_encoder_outputs: tokens prepared by `generate`.
            labels: (B, L), -100 ignored; shifted inside.
            logits_to_keep: how many positions at the end get logits; 0 for all.
            kwargs: passed to the LLM.

        Returns:
            The LLM's own output.

        Raises:
            ValueError: another number of placeholders than of image and region tokens.
        """
        text = self.model.text_inputs(
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            pixel_values=pixel_values,
            input_points=input_points,
            input_labels=input_labels,
            region_image_index=region_image_index,
            resized_sizes=resized_sizes,
            part_index=part_index,
            region_features=region_features,
        )
        llm = self.model.language_model
        optional = {"position_ids": position_ids, "past_key_values": past_key_values, "labels": labels}
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        known = argument_names(type(llm))  # type: ignore[arg-type]
        kwargs |= {"logits_to_keep": logits_to_keep} if "logits_to_keep" in known else {}
        if "position_ids" not in known:  # a model that counts by its mask, such as Bloom
            kwargs.pop("position_ids", None)
        return llm(**text, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Continue conversations; takes all that [`TapLlmProcessor`] returns.

        With `past_key_values` the ids are those of the whole conversation. The features given may be those of all its
        placeholders, or those of the ones that are not in the cache yet.

        Args:
            inputs: `input_ids`, if given by position.
            generation_config: settings; those of the model by default.
            kwargs: inputs as in `forward` (or `image_embeddings` for `pixel_values`), and generation options.

        Returns:
            As in Transformers: (B, L + new) ids; placeholders are never generated.

        Raises:
            ValueError: another number of placeholders than of image and region tokens.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        features = {name: kwargs.pop(name, None) for name in FEATURE_INPUTS}
        for unused in ("original_sizes", "labels"):
            kwargs.pop(unused, None)
        rows = prepared_rows(kwargs.pop("mm_encoder_outputs", None)) or self.model.feature_rows(**features)
        if ids is not None:
            rows = self._new_rows(ids, rows, kwargs)
        if rows:  # fresh at every call: beam search repeats the rows in place
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=rows)}
        settings = generation_config if generation_config is not None else self.generation_config
        suppressed = {*(kwargs.get("suppress_tokens") or settings.suppress_tokens or []), self.config.region_token_id}
        kwargs["suppress_tokens"] = sorted(suppressed - {None}) or None
        return super().generate(ids, generation_config=generation_config, **kwargs)

    def _new_rows(self, ids: Tensor, rows: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        """The rows of placeholders that are not in the cache yet, after a count."""
        cached = cached_length(ids, options.get("attention_mask"), options.get("past_key_values"))
        mask = placeholder_mask(ids, self.config.region_token_id)
        if cached and len(rows) == int(mask.sum()):
            is_new = (mask.nonzero()[:, 1] >= cached).tolist()
            rows = [row for row, new in zip(rows, is_new, strict=True) if new]
        placeholder_mask(ids[:, cached:], self.config.region_token_id, len(rows))
        return rows

    @torch.no_grad()
    def to_prompt_embeds(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **features: Any
    ) -> list[dict[str, Tensor]]:
        """Prompts for a server that takes embeddings (such as vLLM's `prompt_embeds`) and runs the bare LLM.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L); padding is cut off.
            features: images and regions, as in `forward`.

        Returns:
            Per conversation `prompt_embeds` (L, d) and `prompt_token_ids` (L,), placeholders included.
        """
        embeds = self.model.embed(input_ids, self.model.feature_rows(**features))
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return [
            {"prompt_embeds": row[mask], "prompt_token_ids": ids[mask]}
            for row, ids, mask in zip(embeds, input_ids, kept.bool(), strict=True)
        ]


__all__ = ["TapLlmForConditionalGeneration", "TapLlmModel", "TapLlmPreTrainedModel"]
