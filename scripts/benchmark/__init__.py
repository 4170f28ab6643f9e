"""What `scripts/bench` is made of; the program itself says what it measures and how to use it.

=============  ======================================================================================================
`report`       rows, contenders and aims as tables; samples to medians, ratios, text, Markdown, JSON. Pure
`picture`      the same samples as an SVG picture. Pure
`processes`    commands with time limits, mounts that are taken down again, a namespace that ends with the program
`machine`      what this machine is and has; peers installed
`images`       what is measured on: the reference image, images of many entries, the same tree unpacked and packed
`contenders`   each way to mount that tree
`workloads`    what is done on the mounts, and how long it took
`reader.c`     the reader of files: a program that adds next to nothing to what it measures
`spans`        decodes every span of an image with ocifs's own decoder; run by the interpreter ocifs is installed for
=============  ======================================================================================================

A module imports only from those above it in this order: report, picture; processes, machine, images, contenders, workloads.
"""
