"""Parts of `eval.caption_metrics`: tokens, n-grams, and what Java computes."""
