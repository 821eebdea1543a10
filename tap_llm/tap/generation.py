"""Decoding loop for captions that drops finished rows, so that short captions do not wait for long ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .caption_decoder import TapCaptionDecoder

# Rows are dropped when at least this share of them has ended: selecting rows copies the cache.
DROP_SHARE = 0.125

# Options of `generate` that may know rows by their number, or need Transformers' own loop.
_ROW_AWARE_OPTIONS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "tokenizer", "streamer",
                      "assistant_model", "synced_gpus", "past_key_values", "custom_generate")  # fmt: skip


def treats_rows_alike(options: Mapping[str, Any]) -> bool:
    """Whether nothing in the options of `generate` can tell rows apart, so that they may be split and dropped."""
    return all(options.get(name) is None for name in _ROW_AWARE_OPTIONS)


def can_drop_rows(model: TapCaptionDecoder, generation_config: GenerationConfig) -> bool:
    """Whether [`decode_dropping_finished`] does the same as Transformers' own loop for these settings."""
    plain_modes = ("greedy_search", "sample")
    on_one_device = len(set(getattr(model, "hf_device_map", {}).values())) <= 1
    in_step = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)  # ranks must leave the loop together
    return (
        on_one_device
        and not in_step
        and not generation_config.stop_strings
        and generation_config.get_generation_mode() in plain_modes
        and generation_config.cache_implementation is None
        and generation_config.use_cache is not False
        and not generation_config.return_dict_in_generate
        and generation_config.guidance_scale in (None, 1.0)
    )


class PlaceholderFreeStreamer(BaseStreamer):
    """Hands ids on to a streamer, without the placeholder that starts the prompt.

    Args:
        streamer: what the caller passed to `generate`.
    """

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.started = False

    def put(self, value: Tensor) -> None:
        """Prompt (1, L) first, then one id at a time."""
        self.streamer.put(value if self.started else value[..., 1:])
        self.started = True

    def end(self) -> None:
        """The caption is complete."""
        self.streamer.end()


def _next_ids(scores: Tensor, do_sample: bool) -> Tensor:
    """(N, V) scores -> (N,) ids."""
    if do_sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


def decode_dropping_finished(
    model: TapCaptionDecoder,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy or sampled decoding of prompts of equal length, as a `custom_generate` of `generate`.

    Args:
        model: the caption decoder.
        input_ids: (N, L) prompts without padding.
        logits_processor: edits the scores of a step.
        stopping_criteria: tells per row whether it has ended.
        generation_config: `do_sample` and the pad id are read.
        model_kwargs: `semantic_tokens` (N, D) and an empty cache `past_key_values` are read. (Named as parameters,
            `generate` would not repeat them for several captions per row.) Prompts have no padding, so no mask.

    Returns:
        (N, L + new) int64, rows filled up with the pad id.
    """
    cache = model_kwargs.get("past_key_values") or DynamicCache(config=model.config)
    pad_id = int(generation_config.pad_token_id)
    finished: list[tuple[Tensor, Tensor]] = []
    rows = torch.arange(len(input_ids), device=input_ids.device)  # where the remaining rows belong
    done = torch.zeros_like(rows, dtype=torch.bool)
    ids, step_inputs = input_ids, {"input_ids": input_ids, "semantic_tokens": model_kwargs.get("semantic_tokens")}
    while len(rows) > 0:
        outputs = model(**step_inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        scores = logits_processor(ids, outputs.logits[:, -1].float())
        new = _next_ids(scores, generation_config.do_sample).masked_fill(done, pad_id)
        ids = torch.cat([ids, new[:, None]], dim=1)
        done = done | stopping_criteria(ids, scores)
        ended = int(done.sum())
        if ended == len(rows) or ended >= max(1, DROP_SHARE * len(rows)):
            finished.append((rows[done], ids[done]))
            keep = (~done).nonzero().squeeze(1)
            rows, ids, done, new = rows[keep], ids[keep], done[keep], new[keep]
            if len(keep):
                cache.batch_select_indices(keep)
        step_inputs = {"input_ids": new[:, None]}
    return _gather_rows(finished, len(input_ids), pad_id, input_ids)


def _gather_rows(finished: list[tuple[Tensor, Tensor]], count: int, pad_id: int, like: Tensor) -> Tensor:
    """Put (row numbers, ids) pairs of different lengths back in order: (N, longest)."""
    length = max((ids.shape[1] for _, ids in finished), default=like.shape[1])
    result = like.new_full((count, length), pad_id)
    for rows, ids in finished:
        result[rows, : ids.shape[1]] = ids
    return result
