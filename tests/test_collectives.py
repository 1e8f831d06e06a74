"""Reading collectives off the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.lm.planning.hlo_collectives import Collective, collectives

PROGRAM = """\
HloModule jit_step

%inner (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %r = f32[4,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %y = f32[4,8]{1,0} call(%s), to_apply=%inner
}

%left (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: bf16[2,3]) -> f32[8] {
  %g = bf16[16,3]{1,0} all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7}}
  %s = (u16[4]{0}, u16[8]{0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}
  %d = u16[8]{0} all-gather-done(%s)
  %k = f32[5]{0} all-gather(%b), replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}
  %h = f32[3]{0} reduce-scatter(%b), replica_groups=mesh['x'=4,'y'=2] {'x'}
  %t = (s8[3]{0}, /*index=1*/pred[3]{0}) all-to-all(%b, %c), replica_groups=mesh['x'=8] {'x':(1)4}
  %w = (s32[], f32[4,8]{1,0}) while(%i), condition=%cond, body=%body
  ROOT %c = f32[8]{0} conditional(%w), branch_computations={%left, %right}
}
"""  # noqa: E501


def test_kinds_sizes_groups_loops_and_branches():
    assert collectives(PROGRAM) == [
        Collective("all-reduce", 4 * 32, 4, True),
        Collective("collective-permute", 4 * 8, 2, False, in_branch=True),
        Collective("all-gather", 2 * 48, 8, False),
        Collective("all-gather", 2 * 8, 2, False),
        Collective("all-gather", 4 * 5, 4, False),
        Collective("reduce-scatter", 4 * 3 * 4, 4, False),
        Collective("all-to-all", 6, 4, False),
    ]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_what_a_device_sends_is_all_but_its_own_part(kind, sent):
    assert Collective(kind, 100, 4, False).sent_bytes == sent


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="cannot be read: %g"):
        collectives(PROGRAM.replace("{{0,1,2,3,4,5,6,7}}", "all"))


def test_a_program_for_one_device_has_none():
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: x @ x, x))
    assert collectives(step.lower(jnp.ones((4, 4))).compile().as_text()) == []
