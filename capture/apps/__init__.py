"""What people touch: commands, the demo, the interface of earlier notebooks.

The only part of capture that imports analysis.
"""
