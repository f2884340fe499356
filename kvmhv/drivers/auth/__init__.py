"""How hosts and people prove who they are: certificates, trust between hosts, invitations, tokens."""
