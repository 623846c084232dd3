"""What capture and analysis share: schema, manifest, null model file, decision rule, shards.

Needs numpy and pyarrow alone.
"""
