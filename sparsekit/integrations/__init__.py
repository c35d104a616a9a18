"""sparsekit inside other libraries; each module imports its library, so import the one that you use."""
