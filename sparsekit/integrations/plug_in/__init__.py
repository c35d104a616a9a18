"""What makes ``from_pretrained`` of other libraries load the folders that ``sparsekit.save`` writes."""
