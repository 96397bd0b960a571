from dragon.kernels.inspect.assembly import Lines
from dragon.kernels.inspect.machine_code import late_loads

LOADER = Lines("formats.py", 60, 64)

# Two loads, arithmetic on the first one's data, and a third load; then a store, and a load behind it.
CODE = """
	.section	.text.update_kernel,"ax",@progbits
	//## File "/folder/tile.py", line 30
        /*0010*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
	//## File "/folder/update.py", line 9
        /*0020*/                   IADD3 R2, P0, R4, R61, RZ ;
	//## File "/folder/formats.py", line 62
        /*0030*/              @!P0 LDG.E.128 R12, desc[UR12][R8.64] ;
        /*0040*/              @!P1 LDG.E.128 R20, desc[UR12][R10.64+0x800] ;
	//## File "/folder/tile.py", line 70
        /*0050*/                   FMUL R51, R44, R{used} ;
	//## File "/folder/formats.py", line 62
        /*0060*/              @!P0 LDG.E.128 R28, desc[UR12][R52.64] ;
	//## File "/folder/formats.py", line 70
        /*0070*/              @!P0 STG.E.128 desc[UR12][R52.64], R{stored} ;
	//## File "/folder/formats.py", line 62
        /*0080*/                   LDG.E.128 R32, desc[UR12][R54.64] ;
"""


def code(used: int, stored: int = 60) -> str:
    return CODE.replace("{used}", str(used)).replace("{stored}", str(stored))


def test_a_load_behind_the_first_use_of_another_ones_data_is_late() -> None:
    assert late_loads(code(12), LOADER) == late_loads(code(23), LOADER) == 2


def test_what_is_not_loaded_by_a_tile_may_be_used_between_the_loads() -> None:
    assert late_loads(code(45), LOADER) == late_loads(code(4), LOADER) == 0


def test_a_store_uses_what_it_stores() -> None:
    assert late_loads(code(45, stored=28), LOADER) == 1


def test_where_no_tile_is_loaded_nothing_is_known() -> None:
    assert late_loads("", LOADER) is None
    assert late_loads(code(12), Lines("other.py", 60, 64)) is None
