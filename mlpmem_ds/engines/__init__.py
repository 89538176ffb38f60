"""One file per heavy library (DeepSpeed, faiss, transformers' forward pass); nobody else imports that library
for the purpose."""
