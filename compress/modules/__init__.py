"""Public modules to train with: `overparam`, `flat` and `hypernet`; none needs the others."""
