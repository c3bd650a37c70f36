import pytest

from onebase_server.api.admission import Admission
from onebase_server.errors import BadRequest, Overloaded


def test_places_are_given_back_however_a_request_ends():
    admission = Admission(2)
    with pytest.raises(ValueError, match="broken"), admission.admit(2):
        raise ValueError("broken")
    assert admission.in_flight == 0


def test_more_than_there_is_room_for_now_is_overload():
    admission = Admission(3)
    with admission.admit(2):
        with pytest.raises(Overloaded):
            admission.admit(2).__enter__()
        assert repr(admission) == "Admission(in_flight=2, capacity=3)"


def test_more_than_there_ever_is_room_for_is_a_wrong_request():
    with pytest.raises(BadRequest):
        Admission(3).admit(4).__enter__()
