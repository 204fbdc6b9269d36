"""Judging trained weights: drawing from them and measuring what was drawn. Never imports training or deepspeed."""
