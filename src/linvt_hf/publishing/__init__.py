"""Publishing a model on the Hub: whether its folder is fit for strangers, and the upload. Stays at home."""
