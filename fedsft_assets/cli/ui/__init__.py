"""The command `fedsft ui`: the web user interfaces of Dagster, MLflow and TensorBoard, and who may use them."""
