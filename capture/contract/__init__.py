"""What capture and analysis share: schema, manifest, null model file, decision rule, shards.

Needs numpy, pyarrow and msgspec; scipy inside the functions that fit.
"""
