"""Run directories: gone with their launcher, and those of killed launchers with the next start."""

from octavo.launch.run_dir import RunDir


def test_a_directory_goes_with_all_that_is_in_it(tmp_path):
    run_dir = RunDir(tmp_path)
    (run_dir.path / "ray" / "logs").mkdir(parents=True)
    run_dir.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_launcher_left_is_removed_and_what_lives_is_kept(tmp_path):
    abandoned = tmp_path / "octavo-abandoned"
    abandoned.mkdir()
    (abandoned / "lock").touch()  # nobody holds it
    stranger = tmp_path / "octavo-without-lock"
    stranger.mkdir()
    living = RunDir(tmp_path)
    other = RunDir(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([stranger, living.path, other.path])
    living.remove()
    other.remove()


def test_the_path_leaves_room_for_rays_sockets():
    run_dir = RunDir()
    assert len(str(run_dir.path).encode()) <= 35
    run_dir.remove()
