"""``Client.watch_presence`` with two gateways."""

from tests.support.gateways import JWT_SECRET, admitted, serving
from trio_gateway.client import Presence, connect
from trio_gateway.testing import make_jwt


async def test_client_is_told_who_is_present_on_all_gateways(redis_url: str) -> None:
    def users(presence: Presence) -> list[str]:
        return [user["user_id"] for user in presence.users if user["endpoint"] == "waiter"]

    token = make_jwt(JWT_SECRET, roles=["ADMIN"], sub="3")
    settings = {"ws_cluster": True, "ws_presence_grace": 0.2}
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings) as other,
        connect(f"{one.url}/ws/admin", token) as client,
    ):
        with client.watch_presence(1) as watch:
            assert users(await anext(watch)) == []
            async with admitted(other.staff_url("waiter", sub="21")), admitted(other.diner_url()):
                while not (users(present := await anext(watch)) and present.sessions):
                    pass
                assert users(present) == ["21"]
                assert present.sessions[0]["session_id"] == 456
            while users(present := await anext(watch)) or present.sessions:
                pass
