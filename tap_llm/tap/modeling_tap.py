"""TAP (Tokenize Anything via Prompting, arXiv:2312.09128): the promptable model and its captioning form.

A region is a row: prompts on any number of images form one flat batch of N rows, and `region_image_index` says which
image each row lies on. The parts live beside this file; here they are put together.
"""

from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .caption_decoder import TapCaptionDecoder
from .configuration_tap import TapConfig
from .generation import PlaceholderFreeStreamer, can_drop_rows, decode_dropping_finished, treats_rows_alike
from .mask_decoder import TapMaskDecoder, TapMaskDecoderOutput
from .outputs import TapOutput, route_slots, take_slots
from .prompt_encoder import TapPromptEncoder, attended_points
from .rows import check_rows, images_in_use
from .vision_encoder import TapVisionEncoder

# Captions decoded at a time: bounds the cache (2 MB a row at the official size), never changes a greedy caption.
CAPTION_CHUNK_SIZE = 128

# Image tokens of the regions decoded at a time without gradients, in bytes. A region keeps some twenty such tensors
# busy: on a CPU three regions of the official size then stay in its cache, which is faster than all at once.
CPU_CHUNK_BYTES = 12 * 2**20
CHUNK_BYTES = 256 * 2**20


class TapPreTrainedModel(PreTrainedModel):
    """Base of the TAP models."""

    config: TapConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TapVisionLayer", "TapBottleneck", "TapVisionNeck", "TapPromptEncoder", "TapMaskDecoder",
                         "TapTextLayer"]  # fmt: skip
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["coord_matrix"]
    _supports_sdpa = True
    _supports_flash_attn = True  # asked of every part; only the caption decoder says yes in the end
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TapPromptEncoder):
            init.normal_(module.coord_matrix, std=module.config.scale)

    def fold_batch_norm(self) -> Self:
        """Fold BatchNorm into convolutions, in place, for faster inference; the model can then not be trained or saved.

        Returns:
            itself.
        """
        for module in self.modules():
            if isinstance(module, TapVisionEncoder):
                module.fold_batch_norm()
        return self.eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; raises ValueError for a model whose BatchNorm was folded."""
        if any(isinstance(m, TapVisionEncoder) and m.batch_norm_folded for m in self.modules()):
            raise ValueError("this model's BatchNorm was folded for inference: load it again to save it")
        super().save_pretrained(*args, **kwargs)


class TapModel(TapPreTrainedModel):
    """Images and prompts in; masks, scores, semantic tokens and embeddings out."""

    _keys_to_ignore_on_load_unexpected = [r"^caption_decoder\."]

    def __init__(self, config: TapConfig) -> None:
        super().__init__(config)
        self.vision_encoder = TapVisionEncoder(config.vision_config)
        self.prompt_encoder = TapPromptEncoder(config.prompt_config)
        self.mask_decoder = TapMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.vision_encoder.get_input_embeddings()

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Encode images once, to prompt them any number of times.

        Args:
            pixel_values: (B, 3, S, S) from the processor.

        Returns:
            (B, D, G, G).
        """
        return self.vision_encoder(pixel_values, return_dict=True).last_hidden_state

    def _decode(
        self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor, index: Tensor, **kwargs: Any
    ) -> TapMaskDecoderOutput:
        """Decode all rows at once; the row arguments as in [`check_rows`]."""
        return self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positions=self.prompt_encoder.grid_encoding(image_embeddings.shape[-1]),
            prompt_tokens=self.prompt_encoder(input_points, input_labels),
            region_image_index=index,
            attended=attended_points(input_labels),
            return_dict=True,
            **kwargs,
        )

    def _decode_in_chunks(self, image_embeddings: Tensor, *rows: Tensor, **kwargs: Any) -> TapMaskDecoderOutput:
        """Decode a few rows at a time; memory stays bounded, results are the same."""
        size = self._chunk_size(image_embeddings)
        chunks = []
        for points, labels, index in zip(*(row.split(size) for row in rows), strict=True):
            images, index = images_in_use(image_embeddings, index)
            chunks.append(self._decode(images, points, labels, index, **kwargs))
        joined: dict[str, Any] = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
        return TapMaskDecoderOutput(**joined)

    @staticmethod
    def _chunk_size(image_embeddings: Tensor) -> int:
        """Rows whose image tokens fit the budget of the device."""
        budget = CPU_CHUNK_BYTES if image_embeddings.device.type == "cpu" else CHUNK_BYTES
        return max(1, budget // (image_embeddings[0].numel() * image_embeddings.element_size()))

    def _wants_chunks(self, kwargs: dict[str, Any]) -> bool:
        """Gradients and recorded attentions need one pass; so does a compiled graph."""
        recording = kwargs.get("output_attentions") or self.config.mask_decoder_config.output_attentions
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or recording)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        region_image_index: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        original_sizes: Tensor | None = None,
        resized_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> TapOutput:
        """Segment and tokenize regions.

        Args:
            pixel_values: (B, 3, S, S) from the processor; or `image_embeddings`.
            input_points: (N, n, 2) x, y in canvas pixels.
            input_labels: (N, n) in {0 background, 1 foreground, 2 top-left, 3 bottom-right, 4 pad}.
            region_image_index: (N,) image of each row; may be left out for one image, or one region per image.
            image_embeddings: (B, D, G, G) from [`TapModel.get_image_embeddings`], in place of `pixel_values`.
            original_sizes: accepted and unused, so that the processor's output can be passed whole.
            resized_sizes: accepted and unused.
            kwargs: passed to the attention functions; `output_attentions`, `output_hidden_states`.

        Returns:
            [`TapOutput`].

        Raises:
            ValueError: not exactly one of `pixel_values` and `image_embeddings`, or rows that do not fit together.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("give exactly one of pixel_values and image_embeddings")
        vision = BaseModelOutput(last_hidden_state=image_embeddings)
        if pixel_values is not None:
            vision = self.vision_encoder(pixel_values, return_dict=True, **kwargs)
        images = vision.last_hidden_state
        rows = check_rows(input_points, input_labels, region_image_index, len(images))
        decode = self._decode_in_chunks if self._wants_chunks(kwargs) else self._decode
        decoded = decode(images, *rows, **kwargs)
        return TapOutput(
            pred_masks=decoded.pred_masks,
            iou_scores=decoded.iou_scores,
            semantic_tokens=decoded.semantic_tokens,
            semantic_embeds=decoded.semantic_embeds,
            slots=route_slots(decoded.iou_scores, rows[1]),  # type: ignore[arg-type]
            image_embeddings=images,
            vision_hidden_states=vision.hidden_states,
            vision_attentions=vision.attentions,
            mask_decoder_attentions=decoded.attentions,
        )


class TapForConditionalGeneration(TapPreTrainedModel, GenerationMixin):
    """TAP with its caption decoder."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__(config)
        self.model = TapModel(config)
        self.caption_decoder = TapCaptionDecoder(config.text_config)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected: set[str] = (
            set()
        )  # TapModel's pattern must not hide caption tensors here

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the caption decoder."""
        return self.caption_decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the caption decoder."""
        self.caption_decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Output layer of the caption decoder."""
        return self.caption_decoder.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the caption decoder."""
        self.caption_decoder.set_output_embeddings(new_embeddings)

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """See [`TapModel.get_image_embeddings`]."""
        return self.model.get_image_embeddings(pixel_values)

    def _caption_ids(self, rows: int, device: torch.device) -> Tensor:
        """Prompt of the caption decoder: placeholder of the semantic token, then BOS; (N, 2)."""
        text = self.config.text_config
        return torch.tensor([[text.semantic_token_id, text.bos_token_id]], device=device).repeat(rows, 1)

    def _caption_loss(self, semantic_tokens: Tensor, labels: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and logits (N, L, V) of captions (N, L) on routed semantic tokens (N, D)."""
        text = self.config.text_config
        ids = labels.masked_fill(labels == -100, text.pad_token_id)
        prompt = self._caption_ids(len(labels), labels.device)
        ids = torch.cat([prompt, ids[:, 1:]], dim=1)
        if not len(labels):  # the mean over no captions would be NaN
            logits = semantic_tokens.new_zeros(0, labels.shape[1], text.vocab_size)
            return semantic_tokens.sum() * 0.0, logits
        logits = self.caption_decoder(
            input_ids=ids,
            semantic_tokens=semantic_tokens,
            use_cache=False,
            logits_to_keep=labels.shape[1],
            return_dict=True,
        ).logits
        loss = self.caption_decoder.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        return loss, logits

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        region_image_index: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        original_sizes: Tensor | None = None,
        resized_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> TapOutput:
        """Segment and tokenize regions; with `labels` also score captions.

        Args:
            pixel_values: see [`TapModel.forward`], as all that is not named here.
            input_points: (N, n, 2).
            input_labels: (N, n).
            region_image_index: (N,).
            image_embeddings: (B, D, G, G).
            labels: (N, L) ids with BOS and EOS, -100 ignored; shifted inside.
            original_sizes: accepted and unused.
            resized_sizes: accepted and unused.
            kwargs: passed to the attention functions and, with `labels`, `num_items_in_batch` to the loss.

        Returns:
            [`TapOutput`], with `loss` and `logits` (N, L, V) if `labels` are given.
        """
        loss_kwargs = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        outputs = self.model(
            return_dict=True,
            pixel_values=pixel_values,
            input_points=input_points,
            input_labels=input_labels,
            region_image_index=region_image_index,
            image_embeddings=image_embeddings,
            **kwargs,
        )
        if labels is not None:
            routed = take_slots(outputs.semantic_tokens, outputs.slots)
            outputs.loss, outputs.logits = self._caption_loss(routed, labels, **loss_kwargs)
        return outputs

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        semantic_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Caption regions.

        Args:
            inputs: pixel values, if given by position.
            generation_config: settings; those of the model by default.
            semantic_tokens: (N, D) routed tokens, in place of images and prompts.
            kwargs: all that the processor returns (or `image_embeddings` for `pixel_values`), and generation options
                such as `num_beams`, `do_sample`, `temperature`, `max_new_tokens` (38 by default).

        Returns:
            (N, L) int64: BOS, words, EOS, right pads.

        Raises:
            ValueError: both or neither of images and semantic tokens given.
        """
        names = ("pixel_values", "input_points", "input_labels", "region_image_index", "image_embeddings")
        tensors = {name: kwargs.pop(name, None) for name in names}
        for unused in ("original_sizes", "resized_sizes", "labels", "input_ids", "attention_mask"):
            kwargs.pop(unused, None)
        tensors["pixel_values"] = inputs if inputs is not None else tensors["pixel_values"]
        if semantic_tokens is None:
            outputs = self.model(**tensors)
            semantic_tokens = take_slots(outputs.semantic_tokens, outputs.slots)
        elif any(tensor is not None for tensor in tensors.values()):
            raise ValueError("give either semantic_tokens or images with prompts, not both")
        width = self.config.text_config.semantic_size
        if semantic_tokens.shape[1:] != (width,):
            raise ValueError(
                f"semantic_tokens must be (N, {width}), one routed token per region, got {tuple(semantic_tokens.shape)}"
            )
        return self._generate_captions(semantic_tokens, self._caption_config(generation_config, kwargs), kwargs)

    def _caption_config(self, generation_config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """Settings of a call: at most 38 new ids unless told otherwise; pad and placeholder are never generated."""
        text = self.config.text_config
        config = deepcopy(generation_config if generation_config is not None else self.generation_config)
        for name in [name for name in options if hasattr(config, name)]:
            setattr(config, name, options.pop(name))
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = text.max_position_embeddings - 2
        if config.max_length is not None:
            config.max_length += 1  # Transformers counts the placeholder, the caller does not see it
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(text, name))
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), config.pad_token_id, text.semantic_token_id})
        return config

    def _generate_captions(self, semantic_tokens: Tensor, config: GenerationConfig, options: dict[str, Any]) -> Any:
        """Decode (N, D) tokens, at most `CAPTION_CHUNK_SIZE` rows at a time where rows are alike."""
        if len(semantic_tokens) == 0:
            ids = torch.empty((0, 1), dtype=torch.long, device=semantic_tokens.device)
            return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids
        whole = config.return_dict_in_generate or not treats_rows_alike(options)
        if whole or len(semantic_tokens) <= CAPTION_CHUNK_SIZE:
            return self._generate_chunk(semantic_tokens, config, options)
        chunks = [self._generate_chunk(chunk, config, options) for chunk in semantic_tokens.split(CAPTION_CHUNK_SIZE)]
        length = max(chunk.shape[1] for chunk in chunks)
        return torch.cat([nn.functional.pad(c, (0, length - c.shape[1]), value=config.pad_token_id) for c in chunks])

    def _generate_chunk(self, semantic_tokens: Tensor, config: GenerationConfig, options: dict[str, Any]) -> Any:
        """Run the generation loop on (N, D) tokens and take the placeholder off the result."""
        ids = self._caption_ids(len(semantic_tokens), semantic_tokens.device)
        if treats_rows_alike(options) and can_drop_rows(self.caption_decoder, config):
            options = {**options, "custom_generate": decode_dropping_finished}
        if options.get("streamer") is not None:
            options = {**options, "streamer": PlaceholderFreeStreamer(options["streamer"])}
        result = self.caption_decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # the placeholder must never be taken for padding
            semantic_tokens=semantic_tokens,
            generation_config=config,
            **options,
        )
        if isinstance(result, Tensor):
            return result[:, 1:]
        result.sequences = result.sequences[:, 1:]
        return result


__all__ = ["TapForConditionalGeneration", "TapModel", "TapPreTrainedModel"]
