"""The loss compiled for TPU chips that are not here, at the size it is made for. Skipped without libtpu."""

import pytest

from experiments.bench.loss_tpu import compile_on, report
from experiments.bench.tpu import LIBRARY, estimated_seconds, largest_collective, topology_mesh

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="libtpu is not installed: make .cache/libtpu")


@pytest.fixture(scope="module")
def programs():
    """Per program and loss what the report says: V = 122,880, N = 10,000, K = 4, D = 2,048, 8,192 rows per chip."""
    rows = report("v5p:2x2x1", rows=8192, heads=4, width=2048, vocabulary=122_880, top_n=10_000)
    return {(row["program"], row["form"], row["objective"]): row for row in rows}


@pytest.mark.slow
def test_one_chip_holds_it_and_not_the_dense_form(programs):
    assert programs["one chip", "fused", "mtp_d"]["temp_bytes"] < 4 * 2**30
    assert "refused" in programs["one chip", "dense_top_k", "mtp_d"]


@pytest.mark.slow
def test_every_chip_does_its_share_and_no_more(programs):
    for program in ("one chip", "rows over 4", "tokens over 4"):
        # Beyond the products there are the softmaxes and divergences: a few per cent at this width.
        assert 0.99 < programs[program, "fused", "mtp_d"]["flops_over_share"] < 1.1, program


@pytest.mark.slow
def test_no_collective_is_larger_than_the_gradient_of_the_hidden_states(programs):
    split = programs["tokens over 4", "fused", "mtp_d"]
    assert 2048 < split["largest_collective"] <= split["hidden_gradient"]


@pytest.mark.slow
def test_distillation_costs_little_beside_plain_mtp(programs):
    """By the compiler's estimate, with every pass of the selection counted."""
    ours, plain = (programs["one chip", "fused", objective]["estimated_seconds"] for objective in ("mtp_d", "mtp"))
    assert plain < ours < 1.2 * plain


def test_small_vocabularies_compile_too():
    text = compile_on(topology_mesh(tensor=2), 64, 2, 128, 512, 100, "mtp_d").as_text()
    assert largest_collective(text) > 0


def test_loops_are_multiplied():
    """Two loops, one inside the other, and a branch of which the cheaper counts; then one that counts to a constant."""
    text = """
%inner (p: f32[]) -> f32[] {
  %a = f32[] add(), backend_config={"estimated_cycles":"10"}
}
%outer (p: f32[]) -> f32[] {
  %b = f32[] add(), backend_config={"estimated_cycles":"100"}
  %w = f32[] while(%b), condition=%c, body=%inner
  %k = f32[] conditional(%w), branch_computations={%often, %rare}
}
%often (p: f32[]) -> f32[] {
  %d = f32[] add(), backend_config={"estimated_cycles":"1"}
}
%rare (p: f32[]) -> f32[] {
  %e = f32[] add(), backend_config={"estimated_cycles":"1000"}
}
%c (p: f32[]) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%to_four (p: f32[]) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT, metadata={}
}
ENTRY %main (p: f32[]) -> f32[] {
  %u = f32[] custom-call(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  %o = f32[] while(%p), condition=%c, body=%outer
  %f = f32[] while(%p), condition=%to_four, body=%inner
  %l = f32[] while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"7"}}
}
"""
    assert estimated_seconds(text, (3, 5), hertz=1.0) == 3 * (100 + 5 * 10 + 1) + 4 * 10 + 7 * 10
