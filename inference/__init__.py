"""From a model to text: finding, loading, sampling, generation; imports export, data_pipeline, model and common."""
