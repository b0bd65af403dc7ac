"""The decoder-only transformer: embedding, blocks of attention and MLP, norms and output heads.

Start at `gpt.py`, which is the model; `block.py`, `attention.py` and `mlp.py` are its layers. `docs/model.md` shows how
to run a single layer. Shapes are written in brackets, with one letter per size throughout the package:

    b  batch: sequences of a micro-batch       n  query heads (num_attention_heads)
    s  tokens of a sequence, queries           g  key/value heads (num_kv_heads)
    t  keys: s, plus what the cache holds      m  query heads that share a key/value head, n / g
    h  hidden_size, the residual stream        d  head_dim
    f  intermediate_size of the MLP            r  rotated channels of a head (rotary_dim)
    v  vocab_size

A size over tensor-parallel processes is written as a quotient: [b, s, f/tp].
"""
