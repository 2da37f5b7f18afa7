"""Mean images, and bringing images to the training images' light."""

import torch

from patchsvdd_fast.images.light import match_illumination, mean_colour, mean_image, normalize


def test_mean_image_is_exact():
    images = torch.randint(256, (7, 3, 5, 6), dtype=torch.uint8)
    assert torch.equal(mean_image(images), images.double().mean(dim=0).float())
    channels = mean_image(images, "channel")
    assert channels.shape == (3, 5, 6)
    expected = images.double().mean(dim=(0, 2, 3), keepdim=True)[0].expand(3, 5, 6)
    torch.testing.assert_close(channels, expected.float())


def test_an_image_among_others_is_compared_with_the_mean_of_the_others():
    images = torch.randint(256, (5, 3, 5, 6), dtype=torch.uint8)
    normalized = normalize(images, mean_image(images), num_in_mean=5)
    for number, found in enumerate(normalized):
        others = torch.cat([images[:number], images[number + 1 :]])
        expected = (images[number].double() - others.double().mean(dim=0)) / 255
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_matched_images_do_not_depend_on_the_light():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(20, 200, (3, 3, 24, 30), dtype=torch.uint8, generator=generator)
    colour = mean_colour(images)
    torch.testing.assert_close(colour, images.double().mean(dim=(0, 2, 3)).float())
    expected = match_illumination(images, colour)
    torch.testing.assert_close(
        expected.double().mean(dim=(2, 3)), colour.double().expand(3, 3), rtol=0, atol=0.5
    )
    for light in (torch.tensor([0.9, 1.0, 1.2]), torch.tensor(0.8)):
        lit = (images * light.reshape(-1, 1, 1)).round().byte()
        found = match_illumination(lit, colour)
        assert (found.int() - expected.int()).abs().max() <= 1  # rounding


def test_matching_knows_its_limits():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    dark = torch.full((1, 3, 4, 4), 10, dtype=torch.uint8)
    colour = torch.full((3,), 100.0)
    assert (match_illumination(black, colour) == 0).all()
    assert (match_illumination(dark, colour) == 20).all()
    assert (match_illumination(dark + 245, colour) == 128).all()


def test_images_of_more_than_8_bits_keep_their_fractions():
    """float32 in 0 to 255; of whole numbers everything is as of uint8."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 3, 8, 9), generator=generator, dtype=torch.uint8)
    assert torch.equal(mean_image(images.float()), mean_image(images))
    finer = (images.float() + 0.25).clamp(max=255)
    assert torch.allclose(mean_image(finer), finer.mean(dim=0), rtol=1e-6)
    darker = finer * 0.75
    colour = mean_colour(finer[:1])
    matched = match_illumination(darker[:1], colour)
    assert matched.dtype == torch.float32
    assert torch.allclose(matched, finer[:1], rtol=1e-5)
    assert float(match_illumination(finer, 2 * mean_colour(finer)).max()) == 255
