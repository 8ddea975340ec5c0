"""Every head on every token of some rows: what evaluation folds, a chunk of logits at a time, without gradients."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mtpd_jax.losses.align import AlignedRows
from mtpd_jax.losses.fused import choose_tiling
from mtpd_jax.losses.terms import Distillation, row_terms
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import AnyArray, Array, Bool, Float, Int
from mtpd_jax.sharding import RULES, LastAxis


@struct.dataclass
class TokenScores:
    """Scores of rows, or of one, that are aligned by target: at [j, b, t] of what row j says of token t+1.

    Attributes:
      supervised: [J, B, T]; where there is something to say; elsewhere the others hold anything.
      ce: [J, B, T]; nats against the text, main head first.
      kl: [J, B, T]; KL(main head || head) in nats, over the full vocabulary at temperature 1; 0 for the main head.
      agrees: [J, B, T]; whether the head's argmax is the main head's, or ties with it.
      greedy: [B, T]; whether the main head's argmax is the text's token.
    """

    supervised: Bool[AnyArray, "J *rows T"]
    ce: Float[AnyArray, "J *rows T"]
    kl: Float[AnyArray, "J *rows T"]
    agrees: Bool[AnyArray, "J *rows T"]
    greedy: Bool[AnyArray, "*rows T"]


def score_rows(rows: AlignedRows, unembedding: Float[Array, "V D"], mesh: Mesh) -> TokenScores:
    """Scores aligned rows.

    Args:
      rows: of the main head and any heads.
      unembedding: [V, D]; products run in the dtype of the hidden states, sums in float32.
      mesh: that the program is for; every device scores its own rows over its own part of V.
    """
    # Each device scores its own rows over its own part of the vocabulary.
    vocabulary = LastAxis.of("vocabulary", mesh, platform_of(mesh).on_cpu)
    arrays = rows.hidden, unembedding.astype(rows.hidden.dtype), rows.targets

    def score(hidden: Array, matrix: Array, targets: Array) -> tuple[Array, ...]:
        return _in_chunks(hidden, matrix, targets, vocabulary)

    if mesh.size > 1:
        states, of_rows = RULES.spec(None, "batch"), RULES.spec("batch")
        specs = states, RULES.spec("vocabulary"), of_rows
        score = jax.shard_map(
            score, mesh=mesh, in_specs=specs, out_specs=(states, states, states, of_rows), check_vma=False
        )
    return TokenScores(rows.mask, *score(*arrays))


def _in_chunks(hidden: Array, matrix: Array, targets: Array, vocabulary: LastAxis) -> tuple[Array, ...]:
    """One device's rows, [J, B, T, D] and [B, T]: cross entropy, KL and agreement, [J, B, T], and greedy, [B, T]."""
    (heads, *shape, width), tokens = hidden.shape, matrix.shape[0]
    number = targets.size
    # Chunks of equal size, as the loss has them; the last is filled up.
    tiling = choose_tiling(number, heads, tokens, width, None, vocabulary.on_cpu)
    chunks = -(-number // tiling.chunk_rows)
    padding = chunks * tiling.chunk_rows - number
    hidden_CxJxPxD = jnp.pad(hidden.reshape(heads, number, width), ((0, 0), (0, padding), (0, 0)))
    hidden_CxJxPxD = jnp.moveaxis(hidden_CxJxPxD.reshape(heads, chunks, -1, width), 1, 0)
    targets_CxP = jnp.pad(targets.reshape(number), (0, padding)).reshape(chunks, -1)
    # Forward KL over the full vocabulary at temperature 1, whatever the model was trained with.
    everything = Distillation(vocabulary.size(matrix.T), 1.0, "forward", True) if heads > 1 else None

    def one_chunk(chunk: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden_JxPxD, targets_P = chunk
        # The only place where logits exist.
        logits_JxPxV = jnp.einsum("jpd,vd->jpv", hidden_JxPxD, matrix, preferred_element_type=jnp.float32)
        found = row_terms(logits_JxPxV, logits_JxPxV[:1], targets_P, everything, vocabulary)
        kl = jnp.zeros_like(found.ce) if found.divergence is None else found.divergence[0]
        return found.ce, kl, found.agrees, (found.likeliest == targets_P)[None]

    found = jax.lax.map(one_chunk, (hidden_CxJxPxD, targets_CxP))
    # Chunks in line again, without what was filled up.
    in_line = [jnp.moveaxis(values, 0, 1).reshape(values.shape[1], -1)[:, :number] for values in found]
    ce, kl, agrees, greedy = (values.reshape(-1, *shape) for values in in_line)
    return ce, kl, agrees, greedy[0]


def likeliest_tokens(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"], wanted: Bool[Array, "B T"], mesh: Mesh
) -> Int[Array, "B T"]:
    """The likeliest token after every state, without gradients; a chunk of logits at a time.

    Args:
      hidden: [B, T, D].
      unembedding: [V, D]; products run in the dtype of the hidden states, sums in float32.
      wanted: [B, T]; chunks in which nothing is are not computed, and 0 elsewhere.
      mesh: that the program is for.
    """
    vocabulary = LastAxis.of("vocabulary", mesh, platform_of(mesh).on_cpu)
    hidden, unembedding = jax.lax.stop_gradient((hidden, unembedding.astype(hidden.dtype)))

    def find(hidden: Array, matrix: Array, wanted: Array) -> Array:
        rows, width = wanted.size, hidden.shape[-1]
        tiling = choose_tiling(rows, 1, matrix.shape[0], width, None, vocabulary.on_cpu)
        size, padding = tiling.chunk_rows, -rows % tiling.chunk_rows
        hidden_CxPxD = jnp.pad(hidden.reshape(rows, width), ((0, padding), (0, 0))).reshape(-1, size, width)
        wanted_CxP = jnp.pad(wanted.reshape(rows), (0, padding)).reshape(-1, size)
        order = jnp.argsort(~jnp.any(wanted_CxP, axis=1))

        def one_chunk(index: Array, found: Array) -> Array:
            chunk = order[index]
            logits_PxV = jnp.einsum("pd,vd->pv", hidden_CxPxD[chunk], matrix, preferred_element_type=jnp.float32)
            return found.at[chunk].set(vocabulary.argmax(logits_PxV))

        found = jax.lax.fori_loop(
            0, jnp.sum(jnp.any(wanted_CxP, axis=1)), one_chunk, jnp.zeros_like(wanted_CxP, jnp.int32)
        )
        return jnp.where(wanted, found.reshape(-1)[:rows].reshape(wanted.shape), 0)

    if mesh.size > 1:
        rows = RULES.spec("batch")
        specs = rows, RULES.spec("vocabulary"), rows
        find = jax.shard_map(find, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    with jax.named_scope("likeliest"):
        return find(hidden, unembedding, wanted)
