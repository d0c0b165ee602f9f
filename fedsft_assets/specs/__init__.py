"""What a file of the user's may say: typed, validated, without behaviour.

Every error names the file, the field, what was found and what was expected. Nothing here imports torch, NVFlare or
Dagster.
"""
