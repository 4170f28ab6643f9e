"""Bundles: directories that runc and its like start a container from, with an image's file system mounted in them.

================  =====================================================================================================
`users`           who ``User`` is: the image's own passwd and group, read through its tree
`config`          ``config.json`` from the image's configuration
================  =====================================================================================================
"""
