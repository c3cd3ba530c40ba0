import json

from hpcinfer.comm.library import MpiLibrary
from hpcinfer.diagnosis.facts import DoctorOptions, read_environment, read_facts, read_places

MPI = MpiLibrary("Open MPI 5.0.11")


def uses(places):
    return {place.use: place for place in places}


def test_a_rank_looks_at_everything_that_the_options_name(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/index.h5").write_bytes(b"x" * 100)
    facts = read_facts(DoctorOptions(str(tmp_path / "store"), str(tmp_path / "out.jsonl"), threads=3), MPI, 2, 4)
    places = uses(facts.places)
    assert (facts.rank, facts.world_size, facts.processors.threads) == (2, 4, 3)
    assert facts.trial is not None and facts.trial.problems == {}
    assert places["model"].identity == "index.h5:100" and places["output"].path == str(tmp_path)
    assert "store" not in places and {"Python", "temporary files"} <= set(places)


def test_a_folder_that_will_be_converted_needs_room_for_its_store(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
    for options, folder in ((DoctorOptions(str(tmp_path), "/out/x"), "/out/x.job"),
                            (DoctorOptions(str(tmp_path), "/out/x", "/cache"), "/cache")):  # fmt: skip
        store = uses(read_places(options, {}))["store"]
        assert store.needed_bytes == 5002 and store.path == folder


def test_a_model_that_is_not_there_is_a_problem(tmp_path):
    places = uses(read_places(DoctorOptions(model=str(tmp_path / "none")), {}))
    assert "no model at" in places["model"].problem


def test_caches_are_where_the_variables_say():
    places = uses(read_places(DoctorOptions(), {"HOME": "/h", "TRITON_CACHE_DIR": "/t"}))
    assert (places["Triton's cache"].path, places["user caches"].path) == ("/t", "/h/.cache")


def test_secrets_of_the_environment_stay_there():
    environment = {"SLURM_JWT": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "SLURM_NTASKS": "4"}
    assert read_environment(environment) == {"SLURM_NTASKS": "4"}


def test_a_wrong_number_of_threads_is_kept_as_a_problem(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert "OMP_NUM_THREADS=many" in read_facts(DoctorOptions(), MPI, 0, 1).processors.problem
