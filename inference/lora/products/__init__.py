"""The products of adapters: what each row's own adapters add to the outputs of the model's layers."""
