"""ocifs mounts OCI and Docker images as a live root file system, without unpacking them.

Rooms, from the ground up; a module imports only from rows above its own (``tests/test_architecture.py``):

=========  ====================================================  ==================================================
row        rooms                                                 what it knows
=========  ====================================================  ==================================================
names      ``errors`` ``reference`` ``spec`` ``tree`` ``rules``  errors; ``oci:dir:tag``; documents; nodes; rules
formats    ``tar`` ``archive`` ``compression`` ``erofs``         tar read and written, compression, EROFS; pure
machine    ``forked`` ``mountinfo`` ``evidence``                 work in a child process; what is mounted; what was read
index      ``layer_index`` ``image_tree``                        the two files we keep: one a layer, one an image
merge      ``overlay``                                           every whiteout rule, and nothing else
bytes      ``sources`` ``store``                                 foreign blobs, read-only; our own cache
image      ``image`` ``layer_data``                              joins reference, source, indexes and tree
history    ``history``                                           what every path was in every layer
spans      ``spans``                                             decoded data: cached, shared, decoded ahead
view       ``rootfs`` ``devices``                                an image as names and attributes; as device files
uses       ``fuse`` ``kernel`` ``members`` ``changes``           FUSE; EROFS mounted; tar members; a layer of changes
examiners  ``forensics``                                         what was deleted, who wrote it, is it what was hashed
driver     ``forest`` ``driver``                                 views beside an image; fuse or erofs to the kernel
process    ``daemon`` ``examined`` ``mount``                     life cycle; what examiners see; mounting an image
container  ``bundle``                                            a directory that runc starts a container from
words      ``cli``                                               commands
=========  ====================================================  ==================================================
"""
