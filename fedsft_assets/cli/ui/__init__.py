"""The command `fedsft ui`: the web interfaces of Dagster, MLflow and TensorBoard, behind access control."""
