"""Routers: which experts see a token, and with what weight.

Every router implements ``route(x_BTD, allowed_E) -> Routing``; see :class:`conclave.model.routers.routing.Router` for
what all of them promise; one file each says what they compute.
"""
