"""The published datasets' files and sizes, for every part of the data benchmark; imports nothing heavy."""

ALPACA = "alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
DOLLY = "databricks-dolly-15k/databricks-dolly-15k.jsonl"
OASST1_TRAINING = "oasst1/data/train-00000-of-00001-b42a775f407cee45.parquet"
OASST1_VALIDATION = "oasst1/data/validation-00000-of-00001-134b8fd0c89408b6.parquet"

PUBLISHED_ROWS = {ALPACA: 52_002, DOLLY: 15_011, OASST1_TRAINING: 84_437, OASST1_VALIDATION: 4_401}
FOLDERS = {"alpaca": "alpaca", "dolly": "databricks-dolly-15k", "oasst1": "oasst1"}
