"""The live page at the agent's `/`: what it shows, who may see it, and its files. Reading only."""
