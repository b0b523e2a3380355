"""LCD, RG-LCD and SCott: consistency distillation of latent teachers."""
