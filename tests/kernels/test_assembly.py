import pytest
import triton

from dragon.kernels import norm, update
from dragon.kernels.inspect.assembly import Accesses, Lines, accesses_by_path, calls_in, lines_of, loads_in

PTX = """
	.loc	1 10 5                          // walk.py:10:5 @[ kernel.py:3:1 ]
	// begin inline asm
	@%p3 ld.global.v4.b32 { %r6, %r7, %r8, %r9 }, [ %rd22 + 0 ];
	// end inline asm
$L__tmp7:
	ld.global.L1::evict_first.v2.b64 { %rd1, %rd2 }, [ %rd22 + 0 ];
	.loc	2 90 5                          // table.py:90:5 @[ walk.py:11:5 @[ kernel.py:3:1 ] ]
	ld.global.b64 { %rd18 }, [ %rd3 + 0 ];
	.loc	1 12 5                          // walk.py:12:5 @[ kernel.py:3:1 ]
	st.global.b16 [ %rd22 + 0 ], { %rs1 };
	.loc	1 20 5                          // walk.py:20:5 @[ kernel.py:3:1 ]
	ld.global.b32 { %r6 }, [ %rd22 + 0 ];
	ret;
"""

# Of triton 3.8: each call is named by its location, which several ways may lead to. At the end the code is back
# where it was at first.
NESTED_PTX = """
	.loc	1 10 5                          // walk.py:10:5
	.loc	3 60 7, function_name $L__info_string0, inlined_at 1 10 5 // formats.py:60:7
	// begin inline asm
	.loc	3 60 7, function_name $L__info_string0, inlined_at 1 10 5 // formats.py:60:7
	mov.u32 %r6, 0x0;
	.loc	3 91 7, function_name $L__info_string0, inlined_at 1 10 5 // formats.py:91:7
	ld.global.v4.b32 { %r6, %r7, %r8, %r9 }, [ %rd22 + 0 ];
	// end inline asm
	.loc	2 91 5, function_name $L__info_string0, inlined_at 3 60 7 // table.py:91:5
	ld.global.b64 { %rd18 }, [ %rd3 + 0 ];
	.loc	1 20 5                          // walk.py:20:5
	.loc	3 60 7, function_name $L__info_string0, inlined_at 1 20 5 // formats.py:60:7
	ld.global.b32 { %r6 }, [ %rd22 + 0 ];
	.loc	2 91 5, function_name $L__info_string0, inlined_at 3 60 7 // table.py:91:5
	ld.global.b32 { %r6 }, [ %rd22 + 0 ];
	.loc	1 12 9                          // walk.py:12:9
	add.s64 	%rd2, %rd2, 128;
	.loc	4 80 5, function_name $L__info_string0, inlined_at 3 60 7 // maths.py:80:5
	mul.rn.f32 	%r22, %r6, %r20;
	ret;
"""

GCN = """
	.loc	1 10 5 is_stmt 1                ; walk.py:10:5 @[ kernel.py:3:1 ]
	s_and_saveexec_b64 s[0:1], vcc
; %bb.3:
	global_load_dwordx4 v[2:5], v[18:19], off
	.loc	1 0 5                           ; walk.py:0:5
	global_load_ushort v1, v[18:19], off
	buffer_store_dwordx2 v[2:3], v1, s[4:7], 0 offen
	s_load_dwordx8 s[4:11], s[20:21], 0x30
	.loc	1 20 5                          ; walk.py:20:5 @[ kernel.py:3:1 ]
	global_store_dword v[2:3], v1, off
	s_endpgm
"""
# Since RDNA 3 names say how many bits an access has.
RDNA = (
    GCN.replace("load_dwordx4", "load_b128")
    .replace("load_ushort", "load_d16_hi_u16")
    .replace("store_dwordx2", "store_b64")
    .replace("store_dword", "store_b32")
)

PATHS = {"vector": Lines("walk.py", 10, 12), "tail": Lines("walk.py", 20, 22), "other": Lines("kernel.py", 9, 9)}
TABLES = [Lines("table.py", 90, 92)]


def test_accesses_of_ptx_are_told_apart_by_their_source_lines() -> None:
    assert accesses_by_path(PTX, PATHS, TABLES) == {
        "vector": Accesses({16: 2}, {2: 1}, 4),
        "tail": Accesses({4: 1}, {}, 2),
        "other": Accesses({}, {}, 0),
    }


def test_calls_that_are_named_one_by_one_are_followed() -> None:
    assert accesses_by_path(NESTED_PTX, PATHS, TABLES) == {
        "vector": Accesses({16: 1}, {}, 6),
        "tail": Accesses({4: 1}, {}, 2),
        "other": Accesses({}, {}, 0),
    }
    # Lines that are counted on within inline assembly are not those of the source.
    assert loads_in(NESTED_PTX, [Lines("formats.py", 60, 60)]) == 2
    assert loads_in(NESTED_PTX, [Lines("formats.py", 91, 91)]) == 0


@pytest.mark.parametrize("assembly", [GCN, RDNA])
def test_accesses_of_amd_are_told_apart_by_their_source_lines(assembly: str) -> None:
    found = accesses_by_path(assembly, PATHS, TABLES)
    assert found["vector"] == Accesses({16: 1, 2: 1}, {8: 1}, 5)
    assert found["tail"] == Accesses({}, {4: 1}, 2)
    assert found["vector"].nbytes == 26


@triton.jit
def callee(x):
    return x


@triton.jit
def caller(x):
    a = callee(
        x,
    )
    return callee(a)


def test_calls_are_found_in_the_order_of_the_source() -> None:
    first, second = calls_in(caller, "callee")
    assert first.last - first.first == 2
    assert second.first == first.last + 1
    assert lines_of(caller).first == first.first - 2


def test_the_walk_over_a_chunk_has_three_paths_and_the_norm_of_a_span_two_and_a_rest() -> None:
    assert len(calls_in(update.update_chunk, "update_tile")) == 3
    assert len(calls_in(norm.norm_kernel, "take_tiles")) == 2
    assert len(calls_in(norm.take_rest, "take_tiles")) == 1


def test_loads_are_counted_where_they_stand() -> None:
    assert loads_in(PTX, TABLES) == 1
    assert loads_in(PTX, [Lines("walk.py", 10, 12)]) == 2
    assert loads_in(PTX, [Lines("walk.py", 10, 20), *TABLES]) == 4
