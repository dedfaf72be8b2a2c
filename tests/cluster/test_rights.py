import re
from pathlib import Path

import redis

import trio_gateway.cluster
from trio_gateway.cluster.keys import Keys
from trio_gateway.cluster.rights import harmless_calls


def test_the_rights_are_those_of_all_scripts() -> None:
    folder = Path(trio_gateway.cluster.__file__).parent
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    used = {name.lower() for name in re.findall(r"redis\.p?call\(\s*'(\w+)'", source)}
    known = {words[0] for words in harmless_calls(Keys())}
    assert used == known | {"publish"}


def test_trying_them_leaves_nothing_behind(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        for words in harmless_calls(Keys()):
            client.execute_command(*words)
        assert client.keys() == []
