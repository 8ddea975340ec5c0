"""The model's pieces in NumPy and float64, for one document without padding, from the formulas alone."""

import numpy as np

EPSILON, THETA = 1e-6, 10_000.0


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * np.asarray(scale, np.float64)


def turn(x):
    """Rotary embedding of [T, heads, H]: pair (i, i + H/2) by position * theta^(-2i/H)."""
    length, half = x.shape[0], x.shape[-1] // 2
    angles = np.arange(length)[:, None, None] * THETA ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def block(x, parameters):
    """A block on [T, D]; each group of query heads shares a key/value head, the two last of its projections."""
    attention, length = parameters["attention"], x.shape[0]
    inner = norm(x, parameters["attention_norm"]["scale"])
    grouped = np.einsum("td,dgrh->tgrh", inner, attention["qkv"]["kernel"]) + attention["qkv"].get("bias", 0)
    groups, per_group, size = grouped.shape[1], grouped.shape[2] - 2, grouped.shape[3]
    q, k, v = grouped[:, :, :-2].reshape(length, -1, size), grouped[:, :, -2], grouped[:, :, -1]
    q, k = turn(norm(q, attention["query_norm"]["scale"])), turn(norm(k, attention["key_norm"]["scale"]))
    k, v = np.repeat(k, per_group, axis=1), np.repeat(v, per_group, axis=1)
    assert q.shape == k.shape == v.shape == (length, groups * per_group, size)
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
    scores = np.where(np.tril(np.ones((length, length)))[None] > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    x = x + np.einsum("tnh,nhd->td", mixed, attention["out"]["kernel"])
    inner = norm(x, parameters["mlp_norm"]["scale"])
    gate, up = np.einsum("td,dcf->ctf", inner, parameters["mlp"]["gate_up"]["kernel"])
    return x + (gate / (1 + np.exp(-gate)) * up) @ parameters["mlp"]["down"]["kernel"]


def cascade(state, embedded, heads, pass_normed):
    """The heads one after the other (DeepSeek-V3 §2.2), their normed states [K, T, D].

    Args:
      state: [T, D]; h^0, after the backbone's final norm.
      embedded: [K, T, D]; Emb(t_{i+k}).
      heads: parameters of each depth's module.
      pass_normed: whether a head hands its normed state on, or the state before its norm.
    """
    normed = []
    for ahead, parameters in zip(embedded, heads, strict=True):
        both = [norm(ahead, parameters["embedding_norm"]["scale"]), norm(state, parameters["hidden_norm"]["scale"])]
        x = block(np.concatenate(both, -1) @ parameters["projection"]["kernel"], parameters["block"])
        normed.append(norm(x, parameters["output_norm"]["scale"]))
        state = normed[-1] if pass_normed else x
    return np.stack(normed)
