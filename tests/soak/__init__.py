"""What `scripts/soak` does for long, each part a function that says what it saw; the program itself says how to use it.

============  ==========================================================================================
`setting`     how much is done, on which image, where; an overlay over the image, and one over a plain tree
`mounted`     mounts in a row; many readers
`overlaid`    stress-ng, fio, and what is held open while the kernel forgets, on a bundle's overlay
`committed`   what was changed in a bundle becomes an image that shows the same
`churn`       a process that changes a tree at random, and one that holds much of a tree and looks again
============  ==========================================================================================

A part gives one sentence, or raises AssertionError with what was wrong. ``tests/test_soak.py`` runs each for a moment.
The process that runs a part touches no mount, as with all tests (`tests.support.mounting`).
"""
