"""What examiners ask of an image: what was deleted, which step wrote this, is it what was hashed.

Every question has a module of its own, that gives values and prints nothing; `examination` is what they all work on: an
image opened under examination, with its layers, its history and the data of any version of any file.

Not here: words and options of commands (`ocifs.cli`), what is kept and how (`ocifs.history`, `ocifs.image_tree`).
"""
