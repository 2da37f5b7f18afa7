"""How the consoles of the pages are compared, and written anew: consoles.py."""

import pytest

from consoles import Shell, looks_like, run_console, shown_anew


def test_wildcards():
    assert looks_like("wrote ..., 3 images\n", "wrote scores.csv, 3 images  \n")
    assert looks_like("a\n...\nd", "a\nb\nc\nd")
    assert looks_like("a\n...\nd", "a\nd")
    assert not looks_like("wrote ..., 3 images", "wrote scores.csv, 4 images")
    assert not looks_like("normal", "normal\nanomalous")
    assert not looks_like("a\n...\nd", "ab\nd")


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("500 training steps, 61.2 s", "2 training steps, 1,204 s"),
        ("score (1.21e-08), 3.5%", "score (0.5), 100.00%"),
        ("at -3,104 of a.png", "at 4,5 of a.png"),
        ("on 2 threads, a", "on 1 thread, a"),
        ("14:02:59 done", "9:03:00 done"),
        ("-12.5", "1e+20"),
        ("K32 is 23x21, 001.png", "K64 is 9x100, 1204.png"),
        ("python 3.11.7, torch 2.13.0+cpu", "python 3.9, torch 2.9.1+cu128"),
        ("│  96.4 │ 100.0 │", "│ 100.0 │   0.0 │"),
        ("a 1\n...\nd 4 ^Cinterrupted", "a 9\nb\nc\nd 8 interrupted"),
        (" GPU   none: a build\n" + " " * 17 + "for the CPU", " GPU   H100, 80 GiB"),
    ],
)
def test_a_number_stands_for_any(shown, printed):
    assert looks_like(shown, printed, any_numbers=True)
    assert not looks_like(shown, printed)
    renewed = shown_anew(shown, printed)
    assert looks_like(renewed, printed, any_numbers=True)
    if "..." not in shown:
        assert renewed.replace("^C", "") == printed + "\n"


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("scored 3 images in 0.5 s", "scored 3 images in 0.5 min"),  # another word
        ("scored 3 images in 0.5 s", "scored three images in 0.5 s"),  # no number
        ("scored 3 images in 0.5 s", "scored images in 0.5 s"),
        ("scored 3 images in 0.5 s", "scored 3 4 images in 0.5 s"),
        ("scored 3 images", "scored 3 images, 1 anomalous"),
        ("threshold 0.5", "threshold nan"),
        ("a 1\nb 2", "a 1"),  # a line less
        ("a 1\nb 2", "a 1\nb 2\nc 3"),  # a line more, at the end and within
        ("a 1\nb 2", "a 1\n1\nb 2"),
        ("a 1\nb 2", "a 1 b 2"),
        ("a 1\n...\nd 4", "a 1\nb 2\nd 4\ne 5"),
        ("with efficientnet_lite0", "with efficientnet_lite4"),  # a name
        (" GPU   none", " CUDA kernels   none"),
        (" GPU   none\n threads 2", " GPU   none"),
        ("a 1\n...\nd 4", "a 1 b\nd 4"),
    ],
)
def test_words_and_lines_are_those_of_the_page(shown, printed):
    assert not looks_like(shown, printed, any_numbers=True)


def test_a_page_is_renewed_but_for_what_it_leaves_out():
    shown = "a 1\n...\nnormal, 2.5 x  (score 6.1e-08)\n^Cinterrupted\n"
    printed = "a 20\nb\nc\nnormal, 0.71 x (score 0.2)\ninterrupted\n"
    expected = "a 20\n...\nnormal, 0.71 x (score 0.2)\n^Cinterrupted\n"
    assert shown_anew(shown, printed) == expected
    assert shown_anew("", "\n") == ""


def test_a_console_is_compared_and_renewed():
    block = "$ echo 3 images  # twice\n7 images\n$ true\n$ echo $?\n0\n"
    assert run_console(Shell(), block) == block.replace("7", "3")
    for wrong in (block.replace("0", "1"), block.replace("7 i", "7 good i")):
        with pytest.raises(AssertionError, match="is not"):
            run_console(Shell(), wrong)
