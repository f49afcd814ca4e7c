"""English texts as public datasets: a module per dataset, which writes JSON Lines of cleaned documents."""
