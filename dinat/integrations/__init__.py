"""The operator and the models inside other libraries; each module imports its own, on demand."""
